#!/usr/bin/env bash
# What the scripts of this folder share: settings, calling redis-cli, messages, exit codes, times.
# It is sourced, never run. Needs bash 4.4, redis-cli 7.0 and coreutils.

set -euo pipefail

prog=${0##*/}

# Exit codes, the same in every script (mpool_help_common prints them).
readonly EXIT_REFUSED=1 EXIT_USAGE=2 EXIT_UNREACHABLE=3 EXIT_NO_MODULE=4

warn() { printf '%s: %s\n' "$prog" "$1" >&2; }

# die CODE LINE…: the first line is the message, the others say what to do about it.
die() {
  local code=$1
  shift
  warn "$1"
  shift
  if (($#)); then printf '  %s\n' "$@" >&2; fi
  exit "$code"
}

die_usage() { die "$EXIT_USAGE" "$1" "See $prog -h."; }

# --- Settings ---------------------------------------------------------------------------------

MPOOL_REDIS_HOST=${MPOOL_REDIS_HOST:-127.0.0.1}
MPOOL_REDIS_PORT=${MPOOL_REDIS_PORT:-6380}
MPOOL_REDIS_USER=${MPOOL_REDIS_USER:-}
MPOOL_REDIS_TLS=${MPOOL_REDIS_TLS:-}
MPOOL_REDIS_CACERT=${MPOOL_REDIS_CACERT:-}
MPOOL_REDIS_CLI=${MPOOL_REDIS_CLI:-redis-cli}
MPOOL_TIMEOUT=${MPOOL_TIMEOUT:-5}

# The environment keeps the password off every command line, where `ps` would show it.
if [[ -n ${MPOOL_REDIS_PASSWORD:-} ]]; then export REDISCLI_AUTH=$MPOOL_REDIS_PASSWORD; fi

mpool_help_common() {
  cat <<'HELP'

Settings (environment):
  MPOOL_REDIS_HOST      where Redis listens (127.0.0.1)
  MPOOL_REDIS_PORT      and its port (6380)
  MPOOL_REDIS_USER      ACL user, with its password in MPOOL_REDIS_PASSWORD
  MPOOL_REDIS_PASSWORD  password; never put on a command line
  MPOOL_REDIS_TLS       1 for TLS, with the CA's file in MPOOL_REDIS_CACERT if it needs one
  MPOOL_REDIS_CLI       the redis-cli to use (redis-cli, 7.0 or newer)
  MPOOL_TIMEOUT         seconds after which a silent Redis is given up (5; sync-slots.sh: 60)

Exit codes:
  0  done
  1  Redis or the module refused; its error is shown
  2  wrong usage
  3  Redis can't be reached, or it refused the login
  4  the Redis reached has no mpool module
HELP
}

check_settings() {
  if [[ ! $MPOOL_REDIS_PORT =~ ^[0-9]{1,5}$ ]] || ((10#$MPOOL_REDIS_PORT < 1 || 10#$MPOOL_REDIS_PORT > 65535)); then
    die_usage "MPOOL_REDIS_PORT must be a port, 1 to 65535"
  fi
  if [[ ! $MPOOL_TIMEOUT =~ ^[0-9]{1,6}$ ]] || ((10#$MPOOL_TIMEOUT < 1)); then
    die_usage "MPOOL_TIMEOUT must be a whole number of seconds, 1 or more"
  fi
  case $MPOOL_REDIS_TLS in
    '' | 0 | 1) ;;
    *) die_usage "MPOOL_REDIS_TLS must be 1 or 0" ;;
  esac
  # redis-cli would silently log in as nobody.
  if [[ -n $MPOOL_REDIS_USER && -z ${REDISCLI_AUTH:-} ]]; then
    die_usage "MPOOL_REDIS_USER needs MPOOL_REDIS_PASSWORD"
  fi
}

# The connection as a user would type it, for printed commands.
cli_as_typed() {
  local typed=redis-cli
  if [[ $MPOOL_REDIS_HOST != 127.0.0.1 ]]; then typed+=" -h $(printf %q "$MPOOL_REDIS_HOST")"; fi
  typed+=" -p $MPOOL_REDIS_PORT"
  if [[ -n $MPOOL_REDIS_USER ]]; then typed+=" --user $(printf %q "$MPOOL_REDIS_USER")"; fi
  if [[ $MPOOL_REDIS_TLS == 1 ]]; then
    typed+=' --tls'
    if [[ -n $MPOOL_REDIS_CACERT ]]; then typed+=" --cacert $(printf %q "$MPOOL_REDIS_CACERT")"; fi
  fi
  printf '%s' "$typed"
}

# --- Talking to Redis -------------------------------------------------------------------------

lines=()        # the reply, one element a line; an absent value is an empty line
outcome=        # ok, refused, auth, unreachable, silent, notredis, nomodule or nocli
error_text=     # what went wrong, in Redis's or redis-cli's own words
redis_input=    # what redis-cli reads with -x or -X: the way for client keys, which `ps` must not show

# redis_try ARGUMENT…: one command; sets lines, outcome and error_text, and never ends the script.
redis_try() {
  local -a call=("$MPOOL_REDIS_CLI" -h "$MPOOL_REDIS_HOST" -p "$MPOOL_REDIS_PORT" -2 --raw -e)
  if [[ -n $MPOOL_REDIS_USER ]]; then call+=(--user "$MPOOL_REDIS_USER"); fi
  if [[ $MPOOL_REDIS_TLS == 1 ]]; then
    call+=(--tls)
    if [[ -n $MPOOL_REDIS_CACERT ]]; then call+=(--cacert "$MPOOL_REDIS_CACERT"); fi
  fi
  # --foreground leaves redis-cli in the terminal's group, so that Ctrl-C ends it at once.
  if type -P timeout >/dev/null; then call=(timeout --foreground "$MPOOL_TIMEOUT" "${call[@]}"); fi

  outcome='' error_text=''
  if ! type -P "$MPOOL_REDIS_CLI" >/dev/null; then
    outcome=nocli error_text="no program named $MPOOL_REDIS_CLI was found" lines=()
    return 0
  fi

  # The exit status follows the reply on a line of its own: mapfile keeps the empty lines at the
  # reply's end, which $(…) would drop.
  mapfile -t lines < <(
    rc=0
    printf '%s' "$redis_input" | "${call[@]}" "$@" 2>&1 || rc=$?
    printf '\n%s\n' "$rc"
  )
  local rc=${lines[-1]}
  unset 'lines[-1]'
  if ((${#lines[@]})) && [[ -z ${lines[-1]} ]]; then unset 'lines[-1]'; fi

  # A password that the server never asked for is worth a word, not a failure.
  local login=
  if ((${#lines[@]})) && [[ ${lines[0]} == 'AUTH failed: '* ]]; then
    login=${lines[0]}
    lines=("${lines[@]:1}")
    if [[ $rc == 0 ]]; then warn "Redis did not take the login and went on without it (${login#AUTH failed: })"; fi
  fi

  if [[ $rc == 0 ]]; then
    outcome=ok
    return 0
  fi
  error_text=${lines[*]:0:1}
  error_text=${error_text//[[:cntrl:]]/?}
  case $rc/$error_text in
    124/* | 137/*) outcome=silent error_text="no answer within $MPOOL_TIMEOUT s" ;;
    */NOAUTH\ * | */WRONGPASS\ * | */DENIED\ *) outcome=auth ;;
    *'/ERR unknown command '*) outcome=nomodule ;;
    */'Could not connect'*) outcome=unreachable ;;
    */'Error: Protocol error'* | */'Error: Server closed the connection'*) outcome=notredis ;;
    */'Unrecognized option'*) outcome=nocli error_text="$MPOOL_REDIS_CLI: $error_text" ;;
    *) if [[ $error_text =~ ^[A-Z]+\  ]]; then outcome=refused; else outcome=unreachable; fi ;;
  esac
  if [[ $outcome == auth && -n $login ]]; then error_text=${login#AUTH failed: }; fi
}

# What a user can do about an error code.
hint_for() {
  case $1 in
    NOKEY) echo "No such key is registered in this Redis. Check it, or make one with medium.sh." ;;
    REVOKED) echo "The key was revoked. Make a new one with medium.sh, high.sh or supreme.sh." ;;
    EXPIRED) echo "The key is past its validity. Make a new one with medium.sh, high.sh or supreme.sh." ;;
    POOLFULL) echo "Every slot is in use; the last number is the time (unix ms) at which the next falls due. See pool-status.sh." ;;
    NOACCOUNT) echo "No usable account: put an account's JSON file into account/ and its tier's folder, and see pool-status.sh." ;;
    NOTOKEN) echo "This node does not have the account's file: put it into account/ and its tier's folder here too." ;;
    READONLY) echo "This Redis is a replica: set MPOOL_REDIS_HOST and MPOOL_REDIS_PORT to its primary." ;;
    MISCONF) echo "Redis can't save to disk and takes no writes: see its log and free some disk." ;;
    OOM) echo "Redis is at its maxmemory and takes no writes." ;;
    LOADING) echo "Redis is still loading its data, or the module is reading it: try again in a moment." ;;
    NOPERM) echo "The ACL user may not run this command: see ACL SETUSER." ;;
    MASTERDOWN) echo "This replica has lost its primary: ask the primary." ;;
    BUSY) echo "Redis is busy with a script: try again in a moment." ;;
  esac
}

# redis_fail: ends the script with the message and the code that the last redis_try calls for.
redis_fail() {
  local at="$MPOOL_REDIS_HOST:$MPOOL_REDIS_PORT" hint
  case $outcome in
    refused)
      hint=$(hint_for "${error_text%% *}")
      die "$EXIT_REFUSED" "$error_text" ${hint:+"$hint"}
      ;;
    nomodule)
      die "$EXIT_NO_MODULE" "the Redis at $at has no mpool module" \
        "Start one that has, with: make run" \
        "(or set MPOOL_REDIS_HOST and MPOOL_REDIS_PORT to where it is)"
      ;;
    auth)
      case $error_text in
        DENIED*) die "$EXIT_UNREACHABLE" "the Redis at $at refuses connections from here" "$error_text" ;;
        NOAUTH*) die "$EXIT_UNREACHABLE" "the Redis at $at asks for a password" \
          "Set MPOOL_REDIS_PASSWORD (and MPOOL_REDIS_USER for an ACL user)." ;;
        *) die "$EXIT_UNREACHABLE" "the Redis at $at refused the login" "$error_text" \
          "Check MPOOL_REDIS_PASSWORD and MPOOL_REDIS_USER." ;;
      esac
      ;;
    silent)
      die "$EXIT_UNREACHABLE" "the Redis at $at gave no answer within $MPOOL_TIMEOUT s" \
        "It may be busy or hung, or expect TLS (MPOOL_REDIS_TLS=1); MPOOL_TIMEOUT allows it more time."
      ;;
    notredis)
      die "$EXIT_UNREACHABLE" "what listens at $at does not answer like Redis" "$error_text" \
        "Set MPOOL_REDIS_HOST and MPOOL_REDIS_PORT to where Redis is, and MPOOL_REDIS_TLS=1 if it uses TLS."
      ;;
    nocli)
      die "$EXIT_UNREACHABLE" "$error_text" \
        "Install redis-cli 7.0 or newer (Debian: redis-tools), or set MPOOL_REDIS_CLI to it."
      ;;
    *)
      die "$EXIT_UNREACHABLE" "Redis can't be reached at $at" ${error_text:+"$error_text"} \
        "Start it with: make run" \
        "(or set MPOOL_REDIS_HOST and MPOOL_REDIS_PORT to where it is)"
      ;;
  esac
}

# redis_ask ARGUMENT…: redis_try that ends the script unless all went well.
redis_ask() {
  redis_try "$@"
  if [[ $outcome != ok ]]; then redis_fail; fi
}

# die_reply: the module answered in a form these scripts don't know.
die_reply() {
  die "$EXIT_REFUSED" "the module's answer to $1 has an unknown form" \
    "Scripts and module are of different versions: use the scripts that came with the module."
}

# read_secret VARIABLE ARGUMENT: a client key from the command line, or from stdin for "-".
read_secret() {
  local -n target=$1
  if [[ $2 == - ]]; then
    if [[ -t 0 ]]; then
      IFS= read -rsp 'Client key: ' target || true
      echo >&2
    else
      IFS= read -r target || true
    fi
    target=${target%$'\r'}
  else
    # shellcheck disable=SC2034 # it is a reference to the caller's variable
    target=$2
  fi
}

# --- Times ------------------------------------------------------------------------------------
# All times are shown in UTC, as they mean the same on every machine that shares the pool.

export TZ=UTC0

# time_of VARIABLE MS
time_of() { printf -v "$1" '%(%Y-%m-%d %H:%M)T UTC' "$(($2 / 1000))"; }

# span_of VARIABLE MS: a length of time in its two largest units.
span_of() {
  local s=$(($2 / 1000))
  if ((s < 60)); then
    printf -v "$1" '%d s' "$s"
  elif ((s < 3600)); then
    printf -v "$1" '%d m' $((s / 60))
  elif ((s < 172800)); then
    printf -v "$1" '%d h %d m' $((s / 3600)) $((s % 3600 / 60))
  else
    printf -v "$1" '%d d %d h' $((s / 86400)) $((s % 86400 / 3600))
  fi
}

# give_up_slot COMMAND ARGUMENTS…: what release.sh and revoke.sh have in common: takes -h (calling
# their help), the key or - for stdin, and has COMMAND deal with it. The account whose slot is free
# now is left in lines[1].
give_up_slot() {
  local command=$1
  shift
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
  redis_ask -x "$command"
  if [[ ${lines[0]-} != account ]]; then die_reply "$command"; fi
}
