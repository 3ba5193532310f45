#!/usr/bin/env bash
# Tries a run on several hosts on this machine. See usage() and common.sh.
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
Usage: launch/local_multiprocess.sh [--processes N] [--devices M] [--dry-run]
         -- FLAGS

Runs python -m vocojax.train FLAGS in N processes (2) that take each other for
hosts, each with M CPU devices (4) that share this machine's cores: to try a mesh
or what happens when a host dies, not to be fast. Each line of output begins with
the number of its process. Ctrl-C and SIGTERM make all save and stop, a second
Ctrl-C ends them at once. Run again, with any N and M, it resumes from there.

Needs what launch/quickstart.sh needs: Python 3.11 or newer, and the network the
first time, to make .venv. config.data.batch_size must divide by N times M.

  --dry-run   print the commands, install and run nothing

For example: launch/local_multiprocess.sh -- \
  --config=configs/easyvqa_1tok.py --workdir=runs/two_processes
END
}

# number OPTION VALUE: checks that VALUE is a positive number.
number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] ||
    die "$1: found '$2', expected a positive whole number"
}

processes=2
devices=4
dry=
while (($#)); do
  case $1 in
    --help | -h) usage && exit ;;
    --processes) number "$1" "${2-}" && processes=$2 && shift ;;
    --devices) number "$1" "${2-}" && devices=$2 && shift ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    *) die "$1: unknown; flags of vocojax.train come after --" ;;
  esac
  shift
done
(($#)) || die "no flags of vocojax.train; they come after --, see --help"

port=8476
if [[ -z $dry ]]; then
  install cpu
  port=$(.venv/bin/python -c 'import socket
with socket.socket() as s:
  s.bind(("localhost", 0))
  print(s.getsockname()[1])')
fi
variables=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")

# command_of I: the words of the command of process I, in the array `words`.
command_of() {
  words=(env "${variables[@]}" .venv/bin/python -u -m vocojax.train "${flags[@]}"
    "--coordinator_address=localhost:$port" "--num_processes=$processes"
    "--process_id=$1")
}

# number_lines I: puts I before each line of its input, until that ends.
number_lines() {
  local line
  trap '' INT TERM
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

flags=("$@")
if [[ -n $dry ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i"
    printf '%q ' "${words[@]}"
    echo
  done
  exit
fi

pids=()
# end SIGNAL: sends it to all that still run, and to their data workers.
# shellcheck disable=SC2329 # the traps call it
end() {
  kill "-$1" -- "${pids[@]/#/-}" 2>/dev/null || true
}
# shellcheck disable=SC2329 # a trap calls it
interrupt() {
  end INT
  trap kill_all INT
}
# shellcheck disable=SC2329 # a trap calls it
kill_all() {
  exec 3>&2 2>/dev/null # bash would report each
  end KILL
  echo "interrupted" >&3
  exit 130
}
set -m # a group of its own for each process, or it would not see Ctrl-C
trap interrupt INT
trap 'end TERM' TERM
for ((i = 0; i < processes; i++)); do
  command_of "$i"
  "${words[@]}" > >(number_lines "$i") 2>&1 </dev/null &
  pids+=("$!")
done
status=0
for pid in "${pids[@]}"; do
  # A signal to this script ends `wait` before the process does.
  while wait "$pid" && code=0 || code=$?; kill -0 "$pid" 2>/dev/null; do :; done
  ((status)) || status=$code
done
exit "$status"
