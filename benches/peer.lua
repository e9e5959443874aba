-- The pool as one would write it in an afternoon: a Lua script over the keys
-- that the module uses, with sorted sets of its own for what the module keeps
-- in memory. The benchmarks measure the module against it; tests/peer.rs shows
-- that it keeps the module's rules, as far as these commands go.
--
--   EVALSHA sha 0 acquire  key now slots rotation_ms [wanted]
--   EVALSHA sha 0 release  key
--   EVALSHA sha 0 revoke   key
--   EVALSHA sha 0 cooldown account now ms
--   EVALSHA sha 0 status   count
--
-- `wanted` settles a tie, for tests. Accounts are added by hand: SET
-- medium_pool:slots:{account} 0, ZADD peer:by_use 0 {account}.

local call = redis.call
local BY_USE = 'peer:by_use'   -- lendable accounts by slots in use
local COOLING = 'peer:cooling' -- accounts that cool down, by its end
local DUE = 'peer:due'         -- keys that hold a slot, by next rotation or their own end
local SWEEP = 64               -- overdue leases freed by one command

local function used(account)
  return tonumber(call('GET', 'medium_pool:slots:' .. account) or '0')
end

-- Writes an account's slots in use.
local function count(account, step)
  local slots = call('INCRBY', 'medium_pool:slots:' .. account, step)
  call('ZADD', BY_USE, 'XX', slots, account)
end

local function holders(account)
  local keys = {}
  for _, key in ipairs(call('ZRANGE', DUE, 0, -1)) do
    if call('HGET', 'key_rotation:' .. key, 'account') == account then
      keys[#keys + 1] = key
    end
  end
  return keys
end

-- Frees the slot of a key that is overdue or whose account is lost.
local function free(key, account)
  call('HSET', 'key_rotation:' .. key, 'previous_account', account)
  call('HDEL', 'key_rotation:' .. key, 'account')
  call('ZREM', DUE, key)
  count(account, -1)
end

-- Frees overdue leases, but for one key's.
local function sweep(now, except)
  for _, key in ipairs(call('ZRANGEBYSCORE', DUE, '-inf', now, 'LIMIT', 0, SWEEP)) do
    if key ~= except then
      free(key, call('HGET', 'key_rotation:' .. key, 'account'))
    end
  end
end

local function fail(text)
  return redis.error_reply(text)
end

-- The key's record, or an error.
local function registered(key, now)
  local record = call('HMGET', 'client_keys:' .. key, 'use_pool', 'active', 'expires_at')
  if not record[2] then return nil, fail('NOKEY no such key') end
  if record[2] ~= 'true' then return nil, fail('REVOKED the key is revoked') end
  if record[3] and now >= tonumber(record[3]) then return nil, fail('EXPIRED the key has expired') end
  return record
end

local function warm(now)
  for _, account in ipairs(call('ZRANGEBYSCORE', COOLING, '-inf', now)) do
    call('ZREM', COOLING, account)
    call('ZADD', BY_USE, used(account), account)
  end
end

local function acquire(key, now, slots, rotation, wanted)
  local record, refused = registered(key, now)
  if refused then return refused end
  local name = 'key_rotation:' .. key
  local lease = call('HMGET', name, 'account', 'next_rotation', 'last_rotation', 'previous_account')
  local own, due, before = lease[1], tonumber(lease[2]), lease[4]
  local over = due and now >= due
  if own and not over then
    return {'account', own, 'state', 'current', 'previous_account', before,
            'last_rotation', tonumber(lease[3]), 'next_rotation', due}
  end
  local state = 'rotated'
  if not own and (not due or not before) then
    state = 'assigned'
  elseif not own and not over then
    state = 'failover'
  end

  warm(now)
  local least = call('ZRANGE', BY_USE, 0, 0)
  if not least[1] then
    local back = call('ZRANGE', COOLING, 0, 0, 'WITHSCORES')
    return fail('NOACCOUNT no account can be lent' .. (back[2] and ' ' .. back[2] or ''))
  end
  sweep(now, key)
  -- The key's own slot counts as free.
  if own then count(own, -1) end
  local avoided = own or before
  local fewest = tonumber(call('ZRANGE', BY_USE, 0, 0, 'WITHSCORES')[2])
  if fewest >= slots then
    local next = call('ZRANGEBYSCORE', DUE, '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
    local back = call('ZRANGE', COOLING, 0, 0, 'WITHSCORES')[2]
    if back and (not next or tonumber(back) < tonumber(next)) then next = back end
    return fail('POOLFULL every slot is in use' .. (next and ' ' .. next or ''))
  end
  local ties = call('ZCOUNT', BY_USE, fewest, fewest)
  local place = math.random(0, ties - 1)
  local chosen = call('ZRANGE', BY_USE, place, place)[1]
  if chosen == avoided and ties > 1 then
    place = (place + math.random(1, ties - 1)) % ties
    chosen = call('ZRANGE', BY_USE, place, place)[1]
  end
  if wanted and (wanted ~= avoided or ties == 1)
      and tonumber(call('ZSCORE', BY_USE, wanted) or slots) == fewest then
    chosen = wanted
  end

  local next = now + rotation
  if avoided then
    call('HSET', name, 'account', chosen, 'next_rotation', next, 'last_rotation', now,
         'previous_account', avoided)
  else
    call('HSET', name, 'account', chosen, 'next_rotation', next, 'last_rotation', now)
  end
  call('ZADD', DUE, math.min(next, tonumber(record[3] or next)), key)
  count(chosen, 1)
  return {'account', chosen, 'state', state, 'previous_account', avoided,
          'last_rotation', now, 'next_rotation', next}
end

local function release(key)
  if call('EXISTS', 'client_keys:' .. key) == 0 then return fail('NOKEY no such key') end
  local name = 'key_rotation:' .. key
  local account = call('HGET', name, 'account')
  if account then
    call('HSET', name, 'previous_account', account)
    call('HDEL', name, 'account', 'next_rotation')
    call('ZREM', DUE, key)
    count(account, -1)
  end
  return {'account', account}
end

local function revoke(key)
  if call('EXISTS', 'client_keys:' .. key) == 0 then return fail('NOKEY no such key') end
  call('HSET', 'client_keys:' .. key, 'active', 'false')
  return release(key)
end

local function cooldown(account, now, ms)
  sweep(now)
  local name = 'medium_pool:cooldown:' .. account
  if ms == 0 then
    call('DEL', name)
    call('ZREM', COOLING, account)
    call('ZADD', BY_USE, used(account), account)
    return 'OK'
  end
  call('SET', name, now + ms)
  call('ZREM', BY_USE, account)
  call('ZADD', COOLING, now + ms, account)
  for _, key in ipairs(holders(account)) do free(key, account) end
  return 'OK'
end

local function status(number)
  local rows = {}
  for _, account in ipairs(call('ZRANGE', BY_USE, 0, number - 1)) do
    rows[#rows + 1] = {'account', account, 'slots', used(account),
                       'until', call('GET', 'medium_pool:cooldown:' .. account)}
  end
  return rows
end

local command, first = ARGV[1], ARGV[2]
if command == 'acquire' then
  return acquire(first, tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6])
elseif command == 'release' then
  return release(first)
elseif command == 'revoke' then
  return revoke(first)
elseif command == 'cooldown' then
  return cooldown(first, tonumber(ARGV[3]), tonumber(ARGV[4]))
elseif command == 'status' then
  return status(tonumber(first))
end
return fail('ERR unknown command')
