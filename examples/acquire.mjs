// Acquire, use, report: what a proxy does for each request. Paste what you need.
//
//     MPOOL_KEY=sk-cli-v1-… node acquire.mjs https://api.example.com/v1/models
//
// Needs the npm package redis. Prints the answer, never a token. Redis is at MPOOL_REDIS_HOST
// (127.0.0.1), MPOOL_REDIS_PORT (6380), with MPOOL_REDIS_PASSWORD if it asks for one, and MPOOL_REDIS_USER for an ACL user.
import { createClient } from 'redis'

const { MPOOL_REDIS_HOST: host = '127.0.0.1', MPOOL_REDIS_PORT: port = '6380', MPOOL_REDIS_USER: username, MPOOL_REDIS_PASSWORD: password } = process.env
const pool = createClient({ RESP: 3, username, password, socket: { host, port: Number(port), reconnectStrategy: false } })
pool.on('error', () => {}) // each command rejects with the error, too

// The upstream's answer, or a refusal in its form.
export async function request(key, url) {
  for (const lastTry of [false, true]) {
    let lease
    try {
      lease = await pool.sendCommand(['MPOOL.ACQUIRE', key, '*', 'WITHTOKEN'])
    } catch (error) {
      const words = error.message.split(' ')
      if (!['POOLFULL', 'NOACCOUNT', 'LOADING'].includes(words[0])) { // NOKEY, REVOKED, EXPIRED, …
        return new Response(words[0], { status: 403 })
      }
      const due = Number(words.at(-1))
      const wait = due ? Math.max(1, Math.ceil((due - Date.now()) / 1000)) : words[0] === 'LOADING' ? 1 : 60
      return new Response(words[0], { status: 503, headers: { 'retry-after': String(wait) } })
    }
    const credential = lease.auth === 'x-api-key' ? { 'x-api-key': lease.token } : { authorization: `Bearer ${lease.token}` }
    // A token goes to the host it is meant for, nowhere else: no redirects.
    const answer = await fetch(url, { headers: credential, redirect: 'manual' })
    if (![401, 429].includes(answer.status) || lease.state === 'bound' || lastTry) return answer
    await answer.body?.cancel()
    const wait = /^\d+$/.test(answer.headers.get('retry-after')) ? Number(answer.headers.get('retry-after')) : 60
    const ms = Math.min(wait, 86400) * 1000
    await pool.sendCommand(['MPOOL.COOLDOWN', 'medium', lease.account, '*', String(ms),
      'REASON', `the upstream answered ${answer.status}`])
  }
}

const [, , url, key = process.env.MPOOL_KEY] = process.argv
if (!url || !key) {
  console.error('usage: MPOOL_KEY=KEY acquire.mjs URL   or   acquire.mjs URL KEY')
  process.exit(1)
}
await pool.connect()
const answer = await request(key, url)
console.error(answer.status, ...(answer.headers.has('retry-after') ? [`Retry-After: ${answer.headers.get('retry-after')}`] : []))
console.log(await answer.text())
await pool.close()
process.exitCode = answer.ok ? 0 : 1
