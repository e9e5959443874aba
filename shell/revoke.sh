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

give_up_slot MPOOL.REVOKE "$@"

if [[ -n ${lines[1]-} ]]; then
  printf 'Revoked; its slot of account %s is free.\n' "${lines[1]}"
else
  printf 'Revoked; it held no slot.\n'
fi
