#!/usr/bin/env bash
# Revokes a client key: it is refused from now on, and its slot is free at once.

set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

help() {
  cat <<'HELP'
Revokes a client key: it is refused from now on, and the slot it holds is free at once.

Usage:
  revoke.sh KEY
  revoke.sh -         reads the key from stdin, so that the shell's history doesn't have it
HELP
  mpool_help_common
}

case ${1-} in
  -h | --help)
    help
    exit 0
    ;;
  -) ;;
  -?*) die_usage "unknown option" ;;
esac
if (($# != 1)); then die_usage "which key? one is needed"; fi
check_settings

read_secret redis_input "$1"
if [[ -z $redis_input ]]; then die_usage "the key is empty"; fi
redis_ask -x MPOOL.REVOKE
if [[ ${lines[0]-} != account ]]; then die_reply MPOOL.REVOKE; fi

if [[ -n ${lines[1]-} ]]; then
  printf 'Revoked; its slot of account %s is free.\n' "${lines[1]}"
else
  printf 'Revoked; it held no slot.\n'
fi
