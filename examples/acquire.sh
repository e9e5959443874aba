#!/usr/bin/env bash
# Acquire, use, report: what a proxy does for each request. Paste what you need.
#
#     MPOOL_KEY=sk-cli-v1-… ./acquire.sh https://api.example.com/v1/models
#
# Needs redis-cli 7 and curl. Prints the answer, never a token, and puts neither the key nor a token
# on a command line. Redis is at MPOOL_REDIS_HOST (127.0.0.1), MPOOL_REDIS_PORT (6380), with
# MPOOL_REDIS_PASSWORD if it asks for one, and MPOOL_REDIS_USER for an ACL user.
set -euo pipefail

url=${1-} key=${2-${MPOOL_KEY-}}
if [[ -z $url || -z $key ]]; then
  echo 'usage: MPOOL_KEY=KEY acquire.sh URL   or   acquire.sh URL KEY' >&2
  exit 1
fi
if [[ -n ${MPOOL_REDIS_PASSWORD-} ]]; then export REDISCLI_AUTH=$MPOOL_REDIS_PASSWORD; fi
redis=(redis-cli -h "${MPOOL_REDIS_HOST:-127.0.0.1}" -p "${MPOOL_REDIS_PORT:-6380}" --raw -e)
if [[ -n ${MPOOL_REDIS_USER-} ]]; then redis+=(--user "$MPOOL_REDIS_USER"); fi
body=$(mktemp)
trap 'rm -f "$body"' EXIT

for try in first last; do
  # The reply's lines are names and values in turn; -X puts stdin in the place of KEY.
  if ! reply=$(printf %s "$key" | "${redis[@]}" -X KEY MPOOL.ACQUIRE KEY '*' WITHTOKEN 2>&1); then
    code=${reply%%[[:space:]]*} when=${reply##*[[:space:]]}
    if [[ $code != POOLFULL && $code != NOACCOUNT && $code != LOADING ]]; then echo "403 $code" >&2; exit 1; fi
    if [[ $when =~ ^[0-9]+$ ]]; then wait=$((when / 1000 - EPOCHSECONDS)); elif [[ $code == LOADING ]]; then wait=1; else wait=60; fi
    echo "503 $code Retry-After: $((wait > 0 ? wait : 1))" >&2
    exit 1
  fi
  mapfile -t lease <<<"$reply"
  account=${lease[1]} state=${lease[3]} header="Authorization: Bearer ${lease[11]}"
  if [[ ${lease[13]} == x-api-key ]]; then header="x-api-key: ${lease[11]}"; fi

  # Without -L: a token goes to the host it is meant for, nowhere else.
  read -r status wait < <(curl -sS -o "$body" -w '%{http_code} %header{retry-after}\n' \
    -H @<(printf '%s\n' "$header") -- "$url")
  if [[ $status != 401 && $status != 429 || $state == bound || $try == last ]]; then break; fi
  if [[ ! ${wait-} =~ ^[0-9]{1,5}$ ]]; then wait=60; fi
  "${redis[@]}" MPOOL.COOLDOWN medium "$account" '*' $((wait * 1000)) REASON "the upstream answered $status" >/dev/null
done

echo "$status" >&2
cat -- "$body"
[[ $status == 2* ]]
