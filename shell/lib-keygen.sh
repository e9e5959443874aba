#!/usr/bin/env bash
# Making a client key: what medium.sh, high.sh and supreme.sh have in common.
# It is sourced after lib.sh, never run. The tiers differ in one thing: only medium has a pool.
# shellcheck disable=SC2154 # prog, outcome and lines are of lib.sh

readonly DEFAULT_DAYS=30 MAX_DAYS=36500

keygen_help() {
  local tier=$1
  if [[ $tier == medium ]]; then
    cat <<'HELP'
Makes a client key of tier medium.

Usage:
  medium.sh [pool] [DAYS]       a key for the account pool: it leases an account for 24 hours,
                                then moves on to another
  medium.sh ACCOUNT [DAYS]      a key that is bound to one account
HELP
    printf '\n(DAYS alone is not enough: medium.sh pool 60.)\n'
  else
    cat <<HELP
Makes a client key of tier $tier, bound to one account.

Usage:
  $tier.sh ACCOUNT [DAYS]

There is no pool in this tier: $tier keys have request limits and are always bound to one account.
HELP
  fi
  cat <<HELP

  ACCOUNT   the name of a file account/$tier/ACCOUNT.json, without .json
  DAYS      how long the key is valid ($DEFAULT_DAYS; 1 to $MAX_DAYS)

Options:
  -n NAME   a label, to tell keys apart
  -q        print the key alone
  -h        this help

MPOOL_FORWARDER_URL (http://127.0.0.1:8080) is where the printed curl finds the forwarder.
HELP
  mpool_help_common
}

# keygen_main TIER ARGUMENT…
keygen_main() {
  local tier=$1 quiet='' label='' has_label=''
  shift
  local -a words=()
  while (($#)); do
    case $1 in
      -h | --help)
        keygen_help "$tier"
        exit 0
        ;;
      -q) quiet=1 ;;
      -n)
        if (($# < 2)); then die_usage "-n needs a label"; fi
        label=$2 has_label=1
        shift
        ;;
      --)
        shift
        words+=("$@")
        break
        ;;
      -*) die_usage "unknown option $1 (an account whose name begins with - goes after --)" ;;
      *) words+=("$1") ;;
    esac
    shift
  done

  local target=${words[0]-} days=${words[1]-$DEFAULT_DAYS}
  if ((${#words[@]} > 2)); then die_usage "too many arguments"; fi
  if ((${#words[@]} == 0)); then
    if [[ $tier != medium ]]; then die_usage "which account? $tier keys are always bound to one"; fi
    target=pool
  fi

  local pooled=''
  if [[ ${target,,} == pool ]]; then
    if [[ $tier != medium ]]; then
      die "$EXIT_USAGE" "$tier keys can't use a pool: they have request limits and are always bound to one account" \
        "Name the account: $prog ACCOUNT [DAYS]. Pool keys are of tier medium: medium.sh pool."
    fi
    pooled=1
  elif [[ ! $target =~ ^[A-Za-z0-9._@+-]{1,128}$ ]]; then
    die_usage "not an account's name: it has 1 to 128 of the characters A-Z a-z 0-9 . _ @ + -"
  fi
  if [[ ! $days =~ ^[0-9]{1,9}$ ]] || ((10#$days < 1 || 10#$days > MAX_DAYS)); then
    die_usage "DAYS must be a whole number from 1 to $MAX_DAYS"
  fi
  days=$((10#$days))
  check_settings

  local -a command=(MPOOL.KEYGEN "$tier" "${pooled:+POOL}")
  if [[ -z $pooled ]]; then command[2]=$target; fi
  command+=(DAYS "$days")
  if [[ -n $has_label ]]; then command+=(NAME "$label"); fi
  redis_try "${command[@]}"
  if [[ $outcome == refused && $error_text == NOACCOUNT* ]]; then
    local -a hints=("Put its file at account/$tier/$target.json; pool-status.sh shows the accounts there are.")
    if [[ $tier == medium && $target =~ ^[0-9]+$ ]]; then hints+=("For a pool key of $target days: medium.sh pool $target"); fi
    die "$EXIT_REFUSED" "$error_text" "${hints[@]}"
  fi
  if [[ $outcome != ok ]]; then redis_fail; fi
  if [[ ${lines[0]-} != key || ${lines[2]-} != tier || ${lines[4]-} != account || ${lines[6]-} != expires_at ]]; then
    die_reply MPOOL.KEYGEN
  fi

  local key=${lines[1]} expires_at=${lines[7]}
  if [[ -n $quiet ]]; then
    printf '%s\n' "$key"
    return 0
  fi

  local until account=$target day_word=days
  time_of until "$expires_at"
  if ((days == 1)); then day_word=day; fi
  if [[ -n $pooled ]]; then account="pool (one at the first use, then a new one at each rotation)"; fi
  printf 'key      %s\ntier     %s\naccount  %s\nvalid    %s %s, until %s\n' \
    "$key" "$tier" "$account" "$days" "$day_word" "$until"
  if [[ -n $label ]]; then printf 'label    %s\n' "${label//[[:cntrl:]]/?}"; fi
  printf '\nLease its account:\n  %s MPOOL.ACQUIRE %s '\''*'\''\n' "$(cli_as_typed)" "$key"
  local forwarder=${MPOOL_FORWARDER_URL:-http://127.0.0.1:8080}
  printf '\nOr send a request with it through the forwarder:\n  curl %q -H '\''x-api-key: %s'\''\n' \
    "${forwarder%/}/v1/models" "$key"
  if [[ -n $pooled ]]; then pool_note; fi
}

# pool_note: the key is made; says so if it can't lease anything now. Never fails.
pool_note() {
  redis_try MPOOL.STATUS
  # now and its value, the tier's name, then its fields: accounts, slots, used, free, …
  if [[ $outcome != ok || ${lines[2]-} != medium || ${lines[7]-} != used || ${lines[9]-} != free ]]; then return 0; fi
  if ((lines[10] > 0)); then return 0; fi
  if ((lines[8] == 0)); then
    printf '\nNote: the pool has no usable account now. Put account files into account/medium/, and see pool-status.sh.\n' >&2
  else
    printf '\nNote: every slot of the pool is in use now. See pool-status.sh.\n' >&2
  fi
}
