#!/usr/bin/env bash
# Recounts every slot from the leases in Redis and puts right what is wrong.

set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# Recounting a million leases takes Redis longer than one command of the other scripts.
MPOOL_TIMEOUT=${MPOOL_TIMEOUT:-60}
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

help() {
  cat <<'HELP'
Recounts the slots of every account from the leases in Redis, and puts right what is wrong.
It is safe at any time and ends with 0 whether or not there was something to put right.

Usage:
  sync-slots.sh
HELP
  mpool_help_common
}

case ${1-} in
  -h | --help)
    help
    exit 0
    ;;
esac
if (($#)); then die_usage "it takes no arguments"; fi
check_settings

redis_ask MPOOL.REPAIR
if [[ ${lines[0]-} != changed || ${lines[2]-} != counters || ${lines[4]-} != leases || ${lines[6]-} != view ]]; then
  die_reply MPOOL.REPAIR
fi

if [[ ${lines[1]} == 0 ]]; then
  printf 'All is well: nothing had to be changed.\n'
else
  printf 'Put right: %s\n' "${lines[1]}"
  printf '  slot counters  %s\n  leases         %s\n  view           %s\n' "${lines[3]}" "${lines[5]}" "${lines[7]}"
fi
