#!/usr/bin/env bash
# What `run` and `stop` know of the Redis that `make run` starts: where its files are, and how to
# tell it from any other. It is sourced, never run.
# shellcheck disable=SC2034 # some of these are for the scripts that source it

root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
data=$root/data
pidfile=$data/redis.pid
portfile=$data/port
logfile=$data/redis.log

# This Redis is on this machine, whatever the shell scripts are pointed at.
MPOOL_REDIS_HOST=127.0.0.1
# shellcheck source-path=SCRIPTDIR source=../shell/lib.sh
source "$root/shell/lib.sh"

# started_pid FILE: the process that the pidfile names, if it lives; otherwise it fails.
started_pid() {
  local pid
  [[ -f $1 ]] && read -r pid <"$1" && [[ $pid =~ ^[0-9]+$ ]] && kill -0 "$pid" 2>/dev/null || return 1
  printf '%s' "$pid"
}

# is_ours: whether the Redis that answers is the one that `make run` started from this folder. Its
# process must be the pidfile's, and the pidfile must be the one it was started with: a process
# number alone may belong to another Redis by now.
is_ours() {
  local pid line
  pid=$(started_pid "$pidfile") || return 1
  redis_try INFO server
  [[ $outcome == ok ]] || return 1
  local answered=''
  for line in "${lines[@]}"; do
    line=${line%$'\r'}
    if [[ $line == process_id:* ]]; then answered=${line#process_id:}; fi
  done
  [[ $answered == "$pid" ]] || return 1
  redis_try CONFIG GET pidfile
  [[ $outcome == ok && ${lines[1]-} == "$pidfile" ]]
}
