#!/usr/bin/env bash
# Makes a client key of tier supreme; lib-keygen.sh does the work.

set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"
# shellcheck source-path=SCRIPTDIR source=lib-keygen.sh
source "$here/lib-keygen.sh"

keygen_main supreme "$@"
