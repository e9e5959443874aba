#!/usr/bin/env bash
# Ends a client key's lease before its time; the key itself stays valid.

set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

help() {
  cat <<'HELP'
Ends a client key's lease: its slot is free at once, and its next use chooses an account anew.
The key stays valid; revoke.sh ends the key itself.

Usage:
  release.sh KEY
  release.sh -        reads the key from stdin, so that the shell's history doesn't have it
HELP
  mpool_help_common
}

give_up_slot MPOOL.RELEASE "$@"

if [[ -n ${lines[1]-} ]]; then
  printf 'Released; its slot of account %s is free.\n' "${lines[1]}"
else
  printf 'Nothing to release: the key holds no slot.\n'
fi
