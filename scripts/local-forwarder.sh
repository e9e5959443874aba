#!/usr/bin/env bash
# The processes that `make run` starts beside Redis: mpool-forwarder and, where no UPSTREAM is named,
# the demo upstream behind it. How each is started, told from any other, and stopped. It is sourced
# after local-server.sh, never run.
# shellcheck disable=SC2154 # prog, root, data and MPOOL_REDIS_* are of local-server.sh

readonly FORWARDER=forwarder DEMO=demo-upstream     # their files are data/NAME.pid and data/NAME.log
readonly DEFAULT_FORWARDER_PORT=8080
DEMO_PORT=${DEMO_PORT:-8090} # where that is taken, the demo upstream listens on any
release=${CARGO_TARGET_DIR:-target}/release
case $release in /*) ;; *) release=$root/$release ;; esac

# --- Processes --------------------------------------------------------------------------------

words=() # the command line of the process that is_running found

# is_running NAME: whether the process that data/NAME.pid names is the one that was started from
# here. A process number alone may belong to another by now.
is_running() {
  local pid
  words=()
  pid=$(started_pid "$data/$1.pid") && [[ $(readlink "/proc/$pid/cwd") == "$root" ]] || return 1
  { mapfile -d '' -t words <"/proc/$pid/cmdline"; } 2>/dev/null || return 1
  # The forwarder's program is mpool-forwarder.
  [[ ${words[0]-} == *[/-]"$1" ]]
}

# start_process NAME COMMAND…: in a session of its own, so that it outlives make and the terminal.
start_process() {
  local name=$1
  shift
  mkdir -p "$data"
  chmod 700 "$data"
  setsid "$@" </dev/null >>"$data/$name.log" 2>&1 &
  printf '%s\n' "$!" >"$data/$name.pid"
}

# await_process NAME LOG_SIZE COMMAND…: until COMMAND succeeds. If the process ends before, or takes
# too long, its log is shown from LOG_SIZE on.
await_process() {
  local name=$1 log_size=$2 deadline=$((SECONDS + 30))
  shift 2
  until "$@"; do
    if ((SECONDS >= deadline)) || ! started_pid "$data/$name.pid" >/dev/null; then
      {
        printf '%s: the %s did not start. The end of its log (data/%s.log):\n' "$prog" "${name/-/ }" "$name"
        tail -c +"$((log_size + 1))" "$data/$name.log" | tail -n 12
      } >&2
      exit 1
    fi
    sleep 0.1
  done
}

# stop_process NAME: fails if it doesn't run. The first SIGTERM lets the forwarder finish what is
# under way, for as long as its --drain-timeout says; the second cuts it off.
stop_process() {
  local name=$1 pid begun=$SECONDS told='' again=''
  is_running "$name" || return 1
  pid=$(started_pid "$data/$name.pid") || return 1
  kill -TERM "$pid" 2>/dev/null || true
  while is_running "$name"; do
    if ((SECONDS - begun >= 2)) && [[ -z $told ]]; then
      echo "The ${name/-/ } finishes the requests that are under way …"
      told=1
    fi
    if ((SECONDS - begun >= 60)) && [[ -z $again ]]; then
      kill -TERM "$pid" 2>/dev/null || true
      again=1
    fi
    if ((SECONDS - begun >= 70)); then
      die "$EXIT_REFUSED" "the ${name/-/ } (process $pid) was told to stop, but still runs" "See data/$name.log."
    fi
    sleep 0.05
  done
  rm -f "$data/$name.pid"
}

size_of() { stat -c %s "$1" 2>/dev/null || echo 0; }

is_taken() { (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# --- What is wanted ---------------------------------------------------------------------------

forwarder_port='' # the port for clients; admin is on the one after it
upstream=''       # the upstream's base URL; empty for the demo upstream

# The demo upstream's base URL, as it said itself.
demo_url() { sed -n 's|^demo upstream on \(http://[0-9.:]*\)$|\1|p' "$data/$DEMO.log" 2>/dev/null | tail -n 1; }

# plan_forwarder: what is set counts, then what runs already, then the defaults. Complains of what
# can't work before anything is built or started.
plan_forwarder() {
  local port own=''
  forwarder_port=${FORWARDER_PORT:-} upstream=${UPSTREAM:-${MPOOL_UPSTREAM:-}}
  if [[ -n $forwarder_port ]] &&
    { [[ ! $forwarder_port =~ ^[0-9]{1,5}$ ]] || ((10#$forwarder_port < 1 || 10#$forwarder_port > 65534)); }; then
    die "$EXIT_USAGE" "FORWARDER_PORT must be a port, 1 to 65534"
  fi
  if [[ ! $DEMO_PORT =~ ^[0-9]{1,5}$ ]]; then die "$EXIT_USAGE" "DEMO_PORT must be a port, or 0 for any"; fi
  if [[ -n $upstream && ! $upstream =~ ^https?://[^/@?#[:space:]]+(/[^?#[:space:]]*)?$ ]]; then
    die "$EXIT_USAGE" "UPSTREAM must be the base URL of an API, such as https://api.example.com"
  fi
  if is_running "$FORWARDER"; then
    own=${words[2]##*:} # the values of --listen and, below, of --upstream
    forwarder_port=${forwarder_port:-$own}
    if [[ -z $upstream && ${words[8]} != "$(demo_url)" ]]; then upstream=${words[8]}; fi
  fi
  forwarder_port=$((10#${forwarder_port:-$DEFAULT_FORWARDER_PORT}))
  for port in "$forwarder_port" "$((forwarder_port + 1))"; do
    if ((port == MPOOL_REDIS_PORT)); then
      die "$EXIT_USAGE" "port $port can't be both Redis's and the forwarder's" \
        "PORT is the one of Redis; FORWARDER_PORT, and the port after it, are the forwarder's."
    fi
    if [[ -n $own ]] && ((port == own || port == own + 1)); then continue; fi
    if is_taken "$port"; then
      die "$EXIT_UNREACHABLE" "port $port, where the forwarder is to listen, is taken by something else" \
        "Take another port (and the one after it, for health and metrics): FORWARDER_PORT=8180 make run"
    fi
  done
}

# --- Starting ---------------------------------------------------------------------------------

built=''

# build: all that `make run` starts, once.
build() {
  if [[ -n $built ]]; then return 0; fi
  "$root/scripts/install-deps" run
  echo "Building …"
  cargo build --release
  if [[ -z $upstream ]]; then cargo build --release --example "$DEMO"; fi
  built=1
}

start_demo() {
  local port=$((10#$DEMO_PORT))
  if is_running "$DEMO" && demo_is_up; then return 0; fi
  build
  stop_process "$DEMO" || true
  if ((port == forwarder_port || port == forwarder_port + 1)) || is_taken "$port"; then port=0; fi
  rm -f "$data/$DEMO.log"
  start_process "$DEMO" "$release/examples/$DEMO" "127.0.0.1:$port"
  await_process "$DEMO" 0 demo_is_up
  echo "Started a demo upstream on $(demo_url)."
}

demo_is_up() { [[ -n $(demo_url) ]]; }

# admin_page PATH: prints what the forwarder's admin listener answers; fails unless that is a 200.
admin_page() {
  local answer
  answer=$(curl -s --noproxy '*' --max-time 2 -w '%{http_code}' "http://127.0.0.1:$((forwarder_port + 1))$1") || return 1
  printf '%s' "${answer%???}"
  [[ $answer == *200 ]]
}

is_healthy() { admin_page /healthz >/dev/null; }

# A password that Redis never asked for is refused; redis-cli only warns of it.
password_is_asked_for() {
  [[ -n $MPOOL_REDIS_USER ]] && return
  (
    unset REDISCLI_AUTH
    redis_try PING
    [[ $outcome == auth ]]
  )
}

start_forwarder() {
  local -a command without=(-u REDISCLI_AUTH)
  local url=$upstream scheme=redis log_size
  if [[ -z $url ]]; then
    start_demo
    url=$(demo_url)
  fi
  if [[ $MPOOL_REDIS_TLS == 1 ]]; then scheme=rediss; fi
  command=("$release/mpool-forwarder" --listen "127.0.0.1:$forwarder_port" --admin "127.0.0.1:$((forwarder_port + 1))"
    --redis "$scheme://127.0.0.1:$MPOOL_REDIS_PORT" --upstream "$url")

  if is_running "$FORWARDER"; then
    if [[ ${words[*]} == "${command[*]}" ]] && is_healthy; then
      echo "mpool-forwarder already runs on port $forwarder_port, in front of $url."
      return 0
    fi
    build
    echo "mpool-forwarder is started anew, with what is set now."
    stop_process "$FORWARDER" || true
  fi
  build

  # What is set for Redis is the forwarder's too; secrets go by the environment alone.
  local -x MPOOL_REDIS_PASSWORD=${MPOOL_REDIS_PASSWORD:-${REDISCLI_AUTH:-}}
  if [[ -z $MPOOL_REDIS_USER ]]; then without+=(-u MPOOL_REDIS_USER); fi
  if [[ -z $MPOOL_REDIS_CACERT || $scheme == redis ]]; then without+=(-u MPOOL_REDIS_CACERT); fi
  if [[ -z $MPOOL_REDIS_PASSWORD ]] || ! password_is_asked_for; then without+=(-u MPOOL_REDIS_PASSWORD); fi
  log_size=$(size_of "$data/$FORWARDER.log")
  start_process "$FORWARDER" env "${without[@]}" "${command[@]}"
  await_process "$FORWARDER" "$log_size" is_healthy
  echo "Started mpool-forwarder on port $forwarder_port, in front of $url." \
    "Its health and metrics are on port $((forwarder_port + 1))."
  if [[ -n $upstream ]]; then stop_process "$DEMO" || true; fi
}

# forwarder_note: says if requests can't be served yet. Never fails.
forwarder_note() {
  local deadline=$((SECONDS + 5)) why
  until why=$(admin_page /readyz); do
    if ((SECONDS >= deadline)); then
      printf '\nNote: the forwarder can'\''t serve requests now: %s (see data/%s.log)\n' "${why:-no answer}" "$FORWARDER" >&2
      return 0
    fi
    sleep 0.1
  done
}
