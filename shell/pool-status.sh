#!/usr/bin/env bash
# Shows the pool: each account's slots and state, the totals, and the keys that hold a lease.
# It only reads. One call of Redis is enough for a small pool; a large one is read in pages.

set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

readonly PAGE=1000 IN_STATUS=100 SHOWN_LEASES=50 BAR_CELLS=10
# Between the fields of a row; unlike a tab it keeps empty fields apart for `read`.
readonly SEP=$'\x1f'

help() {
  cat <<HELP
Shows each account's slots and state, the totals, and the keys that hold a lease (masked).

Usage:
  pool-status.sh [-w [SECONDS]] [-l N] [TIER]

  TIER           medium, high or supreme alone; otherwise medium and each tier in use
  -w [SECONDS]   shows it again every 2 (or SECONDS) seconds, until Ctrl-C
  -l N           at most N keys per tier; 0 for all ($SHOWN_LEASES on a terminal, otherwise all)
  -h             this help

Colour is used on a terminal, unless NO_COLOR is set. Times are UTC.
HELP
  mpool_help_common
}

# --- What was asked for -----------------------------------------------------------------------

watch='' seconds=2 limit='' tiers=()

while (($#)); do
  case $1 in
    -h | --help)
      help
      exit 0
      ;;
    -w)
      watch=1
      if [[ ${2-} =~ ^[0-9] ]]; then
        seconds=$2
        shift
      fi
      ;;
    -l)
      if [[ ! ${2-} =~ ^[0-9]{1,9}$ ]]; then die_usage "-l needs a number (0 for all)"; fi
      limit=$((10#$2))
      shift
      ;;
    medium | high | supreme) tiers+=("$1") ;;
    -*) die_usage "unknown option $1" ;;
    *) die_usage "no such tier: it is medium, high or supreme" ;;
  esac
  shift
done
if ((${#tiers[@]} > 1)); then die_usage "one tier at a time, or none for all"; fi
if [[ ! $seconds =~ ^[0-9]{1,6}(\.[0-9]{1,3})?$ || $seconds =~ ^[0.]+$ ]]; then
  die_usage "SECONDS must be a number above 0"
fi
check_settings

on_terminal=''
if [[ -t 1 ]]; then on_terminal=1; fi
if [[ -z $limit ]]; then
  limit=0
  if [[ -n $on_terminal ]]; then limit=$SHOWN_LEASES; fi
fi

locale_name=${LC_ALL:-${LC_CTYPE:-${LANG:-}}}
case ${locale_name,,} in
  *utf-8* | *utf8*) full_cell=█ free_cell=░ bar_left='' bar_right='' dots=… middot=· ;;
  *) full_cell='#' free_cell='.' bar_left='[' bar_right=']' dots=... middot=- ;;
esac

bold='' dim='' red='' green='' yellow='' blue='' plain=''
if [[ -n $on_terminal && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
  bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' blue=$'\e[36m' plain=$'\e[0m'
fi

# --- Reading the module's answers -------------------------------------------------------------
# Replies are flat lists of names and values in a fixed order, so they are read by position: a
# value may look like a name. Only where a list may end is the name looked at.

readonly TIER_FIELDS=(accounts slots used free cooling_down invalid leases next_due expired missing)

at=0                  # the line of `lines` to be read next
now=0                 # the module's clock, unix ms
declare -A total=()   # "tier.field" -> value
account_rows=()       # tier, account, used, slots, state, until, reason
lease_rows=()         # tier, key, account, next_rotation, previous_account
invalid_rows=()       # tier, file, reason

expect() {
  if [[ ${lines[at]-} != "$1" ]]; then die_reply MPOOL.STATUS; fi
  at=$((at + 1))
}

# A list that is empty prints as one empty line.
skip_empty_list() {
  if ((at < ${#lines[@]})) && [[ -z ${lines[at]} ]]; then at=$((at + 1)); fi
}

# read_accounts, read_leases, read_invalid_files: append the list that begins at `at`.
read_accounts() {
  expect accounts
  skip_empty_list
  while [[ ${lines[at]-} == account ]]; do
    if ((at + 14 > ${#lines[@]})); then die_reply MPOOL.STATUS; fi
    account_rows+=("${lines[at + 3]}$SEP${lines[at + 1]}$SEP${lines[at + 5]}$SEP${lines[at + 7]}$SEP${lines[at + 9]}$SEP${lines[at + 13]}$SEP${lines[at + 11]//[[:cntrl:]]/?}")
    at=$((at + 14))
  done
}

read_leases() {
  expect leases
  skip_empty_list
  while [[ ${lines[at]-} == key ]]; do
    if ((at + 12 > ${#lines[@]})); then die_reply MPOOL.STATUS; fi
    lease_rows+=("${lines[at + 3]}$SEP${lines[at + 1]//[[:cntrl:]]/?}$SEP${lines[at + 5]}$SEP${lines[at + 7]}$SEP${lines[at + 11]}")
    at=$((at + 12))
  done
}

read_invalid_files() {
  expect invalid_files
  skip_empty_list
  while [[ ${lines[at]-} == tier ]]; do
    if ((at + 6 > ${#lines[@]})); then die_reply MPOOL.STATUS; fi
    invalid_rows+=("${lines[at + 1]}$SEP${lines[at + 3]//[[:cntrl:]]/?}$SEP${lines[at + 5]//[[:cntrl:]]/?}")
    at=$((at + 6))
  done
}

# read_pages WHAT TIER WANTED: the rows of one tier, page by page; 0 for all.
read_pages() {
  local what=$1 tier=$2 wanted=$3 got=0 count=$PAGE cursor=0 read_list=read_${1,,} before last
  while :; do
    if ((wanted > 0 && wanted - got < count)); then count=$((wanted - got)); fi
    redis_ask MPOOL.STATUS "$what" "$tier" NOW "$now" CURSOR "$cursor" COUNT "$count"
    at=0
    before=$((${#account_rows[@]} + ${#lease_rows[@]}))
    "$read_list"
    got=$((got + ${#account_rows[@]} + ${#lease_rows[@]} - before))
    expect cursor
    last=$cursor cursor=${lines[at]-0}
    if [[ $cursor == 0 || $cursor == "$last" ]] || ((wanted > 0 && got >= wanted)); then return 0; fi
  done
}

# count_rows VARIABLE TIER ROW…: how many of the rows are of that tier.
count_rows() {
  local -n counted=$1
  local tier=$2 row
  shift 2
  counted=0
  for row in "$@"; do
    if [[ $row == "$tier$SEP"* ]]; then counted=$((counted + 1)); fi
  done
}

# fetch: reads all that the picture needs, and chooses the tiers to show.
fetch() {
  local tier field have need
  account_rows=() lease_rows=() invalid_rows=() at=0
  redis_ask MPOOL.STATUS
  expect now
  now=${lines[at]-}
  at=$((at + 1))
  for tier in medium high supreme; do
    expect "$tier"
    for field in "${TIER_FIELDS[@]}"; do
      expect "$field"
      total[$tier.$field]=${lines[at]-}
      at=$((at + 1))
    done
  done
  read_accounts
  read_leases
  read_invalid_files

  shown_tiers=("${tiers[@]}")
  if ((${#tiers[@]} == 0)); then
    shown_tiers=(medium)
    for tier in high supreme; do
      count_rows have "$tier" "${account_rows[@]}" "${invalid_rows[@]}"
      if ((have + total[$tier.accounts] + total[$tier.leases] > 0)); then shown_tiers+=("$tier"); fi
    done
  fi

  # STATUS shows the beginning of each list; one that may go on is read anew, in pages.
  if ((${#account_rows[@]} >= IN_STATUS)); then
    account_rows=()
    for tier in "${shown_tiers[@]}"; do read_pages ACCOUNTS "$tier" 0; done
  fi
  local -a first_leases=("${lease_rows[@]}")
  lease_rows=()
  for tier in "${shown_tiers[@]}"; do
    count_rows have "$tier" "${first_leases[@]}"
    need=${total[$tier.leases]}
    if ((limit > 0 && limit < need)); then need=$limit; fi
    if ((have >= need || ${#first_leases[@]} < IN_STATUS)); then
      for field in "${first_leases[@]}"; do
        if [[ $field == "$tier$SEP"* ]]; then lease_rows+=("$field"); fi
      done
    else
      read_pages LEASES "$tier" "$limit"
    fi
  done

  if ((${#account_rows[@]} > 1)); then
    mapfile -t account_rows < <(printf '%s\n' "${account_rows[@]}" | LC_ALL=C sort)
  fi
}

# --- The picture ------------------------------------------------------------------------------

shown_tiers=()
out=()              # the lines of the picture
rows=0 columns=0    # the terminal's size; 0 when there is no terminal to fit into

# The functions below put their result into the variable that is named first: a subshell for each
# would be slow. Their own variables begin with _, so as not to hide the caller's.

# pad VARIABLE TEXT WIDTH: fills up with blanks; `printf %-9s` would count bytes.
pad() { printf -v "$1" '%s%*s' "$2" $(($3 > ${#2} ? $3 - ${#2} : 0)) ''; }

# grouped VARIABLE NUMBER: 1950 as 1,950
grouped() {
  local _digits=$2 _text=''
  while ((${#_digits} > 3)); do
    _text=,${_digits: -3}$_text
    _digits=${_digits:0:-3}
  done
  printf -v "$1" '%s' "$_digits$_text"
}

# counted VARIABLE NUMBER SINGULAR PLURAL
counted() {
  local _number
  grouped _number "$2"
  if (($2 == 1)); then printf -v "$1" '%s %s' "$_number" "$3"; else printf -v "$1" '%s %s' "$_number" "$4"; fi
}

# bar VARIABLE USED OF: a cell for each slot, scaled to 10 cells where there are more. It is empty
# or full only when the account is.
bar() {
  local _used=$2 _of=$3 _cells=$3 _filled=$2 _text='' _i
  if ((_of > BAR_CELLS)); then
    _cells=$BAR_CELLS
    _filled=$((_used * BAR_CELLS / _of))
    if ((_filled == 0 && _used > 0)); then _filled=1; fi
  fi
  if ((_filled > _cells)); then _filled=$_cells; fi
  for ((_i = 0; _i < _filled; _i++)); do _text+=$full_cell; done
  for (( ; _i < _cells; _i++)); do _text+=$free_cell; done
  printf -v "$1" '%s' "$bar_left$_text$bar_right"
}

# countdown VARIABLE MS: "in 23 h 12 m", or "due"
countdown() {
  local _left=$(($2 - now)) _span
  if ((_left <= 0)); then
    printf -v "$1" due
  else
    span_of _span "$_left"
    printf -v "$1" 'in %s' "$_span"
  fi
}

# describe VARIABLE STATE UNTIL REASON: an account's state in words, coloured.
describe() {
  local state=$2 until=$3 reason=$4 colour='' text=$2 when left
  if [[ $until =~ ^[0-9]+$ ]]; then
    time_of when "$until"
    countdown left "$until"
  else
    when='' left=''
  fi
  case $state in
    available) colour=$green ;;
    partial) colour=$blue ;;
    full) colour=$bold ;;
    cooldown)
      colour=$yellow text="cooling down${when:+ until $when ($left)}${reason:+: $reason}"
      ;;
    expired) colour=$yellow text="token expired${when:+ since $when}" ;;
    invalid) colour=$red text="invalid file${reason:+: $reason}" ;;
    missing) colour=$red text="file not on this node" ;;
  esac
  printf -v "$1" '%s' "$colour$text$plain"
}

# add_accounts TIER MOST: a line for each account, by name; 0 for all.
add_accounts() {
  local tier=$1 most=$2 row name used slots state until reason cells share words longest=0 width counts=0 number
  local -a mine=()
  for row in "${account_rows[@]}"; do
    if [[ $row != "$tier$SEP"* ]]; then continue; fi
    mine+=("$row")
    IFS=$SEP read -r _ name used slots _ <<<"$row"
    if ((${#name} > longest)); then longest=${#name}; fi
    share=$used/$slots
    if ((${#share} > counts)); then counts=${#share}; fi
  done
  local -i hidden=0
  if ((most > 0 && ${#mine[@]} > most)); then
    hidden=$((${#mine[@]} - most))
    mine=("${mine[@]:0:most}")
  fi

  # A name that would push the states off the terminal has a line of its own.
  width=$longest
  if ((columns > 0 && width > columns - 50)); then width=$((columns - 50 > 20 ? columns - 50 : 20)); fi
  if ((width > longest)); then width=$longest; fi

  for row in "${mine[@]}"; do
    IFS=$SEP read -r _ name used slots state until reason <<<"$row"
    bar cells "$used" "$slots"
    printf -v share "%${counts}s" "$used/$slots"
    describe words "$state" "$until" "$reason"
    if ((${#name} > width)); then
      out+=("  $name")
      name=''
    fi
    pad name "$name" "$width"
    out+=("  $name  $cells  $share  $words")
  done
  if ((hidden > 0)); then
    grouped number "$hidden"
    out+=("  $dim$dots and $number more$plain")
  fi
}

# add_leases TIER MOST: a line for each key that holds a lease, the next to rotate first.
add_leases() {
  local tier=$1 most=$2 row key account next previous when after key_width=3 account_width=7 number shown=0
  local -a mine=()
  for row in "${lease_rows[@]}"; do
    if [[ $row != "$tier$SEP"* ]] || ((most > 0 && ${#mine[@]} >= most)); then continue; fi
    mine+=("$row")
    IFS=$SEP read -r _ key account _ <<<"$row"
    if ((${#key} > key_width)); then key_width=${#key}; fi
    if ((${#account} > account_width)); then account_width=${#account}; fi
  done
  shown=${#mine[@]}
  if ((columns > 0 && account_width > columns - key_width - 40)); then
    account_width=$((columns - key_width - 40 > 20 ? columns - key_width - 40 : 20))
  fi

  out+=('')
  if ((total[$tier.leases] == 0 && shown == 0)); then
    out+=("  ${dim}no key holds a lease$plain")
    return 0
  fi
  pad key KEY "$key_width"
  pad account ACCOUNT "$account_width"
  out+=("  $dim$key  NEXT ROTATION  $account  BEFORE$plain")
  for row in "${mine[@]}"; do
    IFS=$SEP read -r _ key account next previous <<<"$row"
    countdown when "$next"
    pad key "$key" "$key_width"
    pad after "$when" 13
    if [[ $when == due ]]; then after=$yellow$after$plain; fi
    if [[ -n $previous ]]; then pad account "$account" "$account_width"; fi
    out+=("  $key  $after  $account${previous:+  $previous}")
  done
  if ((total[$tier.leases] > shown)); then
    grouped number $((total[$tier.leases] - shown))
    out+=("  $dim$dots and $number more$plain")
  fi
}

# add_fact NUMBER WORDS: a part of a tier's second line, unless the number is 0.
facts=''
add_fact() {
  local number
  if (($1 == 0)); then return 0; fi
  grouped number "$1"
  facts+="${facts:+ $middot }$number $2"
}

# add_tier TIER MOST_ACCOUNTS MOST_LEASES
add_tier() {
  local tier=$1 percent=0 accounts used slots free cells when have line
  counted accounts "${total[$tier.accounts]}" account accounts
  line="$bold${tier^^}$plain  $accounts"
  if ((total[$tier.slots] > 0)); then
    grouped used "${total[$tier.used]}"
    grouped slots "${total[$tier.slots]}"
    grouped free "${total[$tier.free]}"
    percent=$(((total[$tier.used] * 100 + total[$tier.slots] / 2) / total[$tier.slots]))
    # 100 % is for a full tier, 0 % for an empty one.
    if ((percent == 100 && total[$tier.used] < total[$tier.slots])); then percent=99; fi
    if ((percent == 0 && total[$tier.used] > 0)); then percent=1; fi
    # The tier's own bar has ten cells, however few its slots.
    bar cells $((total[$tier.used] * BAR_CELLS)) $((total[$tier.slots] * BAR_CELLS))
    line+="  $cells  $used of $slots slots in use ($percent %) $middot $free free"
  fi
  out+=('' "$line")

  facts=''
  add_fact "${total[$tier.cooling_down]}" 'cooling down'
  add_fact "${total[$tier.expired]}" 'with an expired token'
  add_fact "${total[$tier.invalid]}" 'invalid'
  add_fact "${total[$tier.missing]}" 'not on this node'
  if [[ ${total[$tier.next_due]} =~ ^[0-9]+$ ]]; then
    countdown when "${total[$tier.next_due]}"
    if [[ $when == due ]]; then when=now; fi
    facts+="${facts:+ $middot }next slot due $when"
  fi
  if [[ $tier != medium ]]; then
    facts+="${facts:+ $middot }keys of this tier are bound to an account and take no slot"
  fi
  if [[ -n $facts ]]; then out+=("$dim$facts$plain"); fi

  count_rows have "$tier" "${account_rows[@]}"
  if ((have == 0)); then
    out+=("  no account yet: put an account's JSON file into account/$tier/")
  else
    add_accounts "$tier" "$2"
  fi
  if [[ $tier == medium ]] || ((total[$tier.leases] > 0)); then add_leases "$tier" "$3"; fi
}

# Files that belong to no account shown: their names are not an account's.
add_invalid_files() {
  local row tier file reason name width=0 number
  local -a mine=()
  local -A shown=()
  for row in "${account_rows[@]}"; do
    IFS=$SEP read -r tier name _ <<<"$row"
    shown[$tier/$name.json]=1
  done
  for row in "${invalid_rows[@]}"; do
    IFS=$SEP read -r tier file reason <<<"$row"
    name=${file##*/}
    if [[ " ${shown_tiers[*]} " != *" $tier "* || -n ${shown[$tier/${name%.json}.json]-} ]]; then continue; fi
    mine+=("$tier/$name$SEP$reason")
    if ((${#tier} + ${#name} + 1 > width)); then width=$((${#tier} + ${#name} + 1)); fi
  done
  if ((${#mine[@]} == 0)); then return 0; fi
  if ((width > 40)); then width=40; fi
  out+=('' "${bold}FILES THAT CAN'T BE USED$plain")
  for row in "${mine[@]}"; do
    pad name "${row%%"$SEP"*}" "$width"
    out+=("  $name  $red${row#*"$SEP"}$plain")
  done
  if ((${#invalid_rows[@]} >= IN_STATUS)); then out+=("  $dim$dots and perhaps more: only the first $IN_STATUS are told$plain"); fi
}

# picture: reads the pool and prints its picture; in a terminal that is watched, it fits into `rows`.
picture() {
  local tier when most_accounts=0 most_leases=$limit room have
  fetch
  if ((rows > 0)); then
    # The lines that are there in any case, then an even share of the rest for each list.
    room=$((rows - 2 - 7 * ${#shown_tiers[@]}))
    if ((${#account_rows[@]} + ${#lease_rows[@]} > room)); then
      most_accounts=$((room / 2 / ${#shown_tiers[@]} > 3 ? room / 2 / ${#shown_tiers[@]} : 3))
      most_leases=$most_accounts
      # What one list does not need, the other takes.
      if ((${#shown_tiers[@]} == 1)); then
        if ((${#account_rows[@]} < most_accounts)); then most_leases=$((room - ${#account_rows[@]})); fi
        if ((${#lease_rows[@]} < most_leases)); then most_accounts=$((room - ${#lease_rows[@]})); fi
      fi
    fi
  fi

  printf -v when '%(%Y-%m-%d %H:%M:%S)T UTC' "$((now / 1000))"
  out=("mpool at $MPOOL_REDIS_HOST:$MPOOL_REDIS_PORT $middot $when")
  for tier in "${shown_tiers[@]}"; do add_tier "$tier" "$most_accounts" "$most_leases"; done
  add_invalid_files

  have=${#out[@]}
  if ((rows > 0 && have > rows)); then
    out=("${out[@]:0:rows-1}" "$dim$dots $((have - rows + 1)) more lines$plain")
  fi
  printf '%s\n' "${out[@]}"
}

# terminal_size: sets rows and columns, 0 where they can't be told.
terminal_size() {
  rows=0 columns=0
  local size
  if [[ -z $on_terminal ]] || ! size=$(stty size 2>/dev/null </dev/tty); then return 0; fi
  if [[ $size =~ ^([1-9][0-9]*)\ ([1-9][0-9]*)$ ]]; then
    rows=${BASH_REMATCH[1]} columns=${BASH_REMATCH[2]}
  fi
}

watch_pool() {
  local frame='' next trouble code line text
  trap 'exit 0' INT
  trap 'exit 143' TERM HUP
  if [[ -n $on_terminal ]]; then
    # On a screen of its own, without a cursor; a line that is too long is cut, as wrapping would
    # push the others out of place.
    trap 'printf "\e[?7h\e[?25h\e[?1049l"' EXIT
    printf '\e[?1049h\e[?25l\e[?7l\e[H\e[2J'
  fi
  while :; do
    terminal_size
    code=0
    next=$(picture 2>&1) || code=$?
    trouble=''
    if ((code == 0)); then
      frame=$next
    elif [[ -z $frame ]]; then
      # It never worked: that is no passing trouble.
      trap - EXIT
      if [[ -n $on_terminal ]]; then printf '\e[?7h\e[?25h\e[?1049l'; fi
      printf '%s\n' "$next" >&2
      exit "$code"
    else
      trouble="$red${next%%$'\n'*} $middot trying again$plain"$'\n'
    fi
    if [[ -n $on_terminal ]]; then
      # Each line is written over the old one and its rest erased, in one go: nothing flickers.
      text=''
      while IFS= read -r line; do text+=$'\n'$line$'\e[K'; done <<<"$trouble$frame"
      printf '\e[H%s\e[J' "${text:1}"
    else
      printf '%s\n\n' "$trouble$frame"
    fi
    # In the background, so that Ctrl-C and a signal are taken at once.
    sleep "$seconds" &
    wait $! || true
  done
}

if [[ -n $watch ]]; then
  watch_pool
else
  terminal_size
  rows=0
  picture
fi
