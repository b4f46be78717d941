# shellcheck shell=bash
# What every job of an export does: the site's set-up, and a run that a signal ends cleanly.
# The script that reads this sets here, where, experiment, said, store, out, lingraft, distributed and restarts.
# shellcheck disable=SC2154

if [ -f "$here/site.sh" ]; then
  # Before `set -eu`: module and conda scripts do not stand it.
  # shellcheck source=/dev/null
  . "$here/site.sh"
fi
set -euo pipefail
cd -- "$where"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" PYTHONUTF8=1

child=
stopped=

# Interrupts what runs, as Ctrl-C does: it gives its place in the store back, and its checkpoint is kept.
stop() {
  stopped=$1
  if [ -n "$child" ]; then
    kill -INT -- "-$child" 2>/dev/null || true
  fi
}
trap 'stop time' USR1
trap 'stop job' TERM

# Runs a command in a process group of its own, so that a signal to this shell is not lost while it waits.
attend() {
  local status=0
  set -m
  "$@" &
  child=$!
  set +m
  if [ -n "$stopped" ]; then
    stop "$stopped"
  fi
  while :; do
    status=0
    wait "$child" || status=$?
    # A signal ends the waiting, not the command.
    kill -0 "$child" 2>/dev/null || break
  done
  if [ -n "$stopped" ]; then
    status=0
    wait "$child" || status=$?
  fi
  child=
  return "$status"
}

# Makes the steps of this task's line of a list; how many processes share a step where it has several GPUs.
task() {
  local list=$1 processes=$2 number=${SLURM_ARRAY_TASK_ID:?this is a task of a job array} keys status=0
  keys=$(sed -n "${number}p" -- "$here/$list.txt")
  if ! [[ $keys =~ ^[0-9a-f]{24}(,[0-9a-f]{24})*$ ]]; then
    echo "error: $list.txt has no line $number: the list is not the one that was exported" >&2
    exit 2
  fi
  local command=("${lingraft[@]}")
  if [ "$processes" -gt 1 ]; then
    command=("${distributed[@]}" "--nproc-per-node=$processes" -m lingraft.cli)
  fi
  attend "${command[@]}" run "$experiment" ${said[@]+"${said[@]}"} --store "$store" --out "$out" --only "$keys" || status=$?
  if [ "$status" -eq 0 ]; then
    : >"$here/done/$list.$number"
    exit 0
  fi
  case $stopped in
    time)
      if [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; then
        echo "the time is nearly up: queued again, to go on from what was kept" >&2
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$number"
        exit 0
      fi
      echo "error: the time was up after $restarts restarts: ask for more (--slurm time=...)" >&2
      ;;
    job)
      echo "stopped from outside: what was finished is kept" >&2
      exit 143
      ;;
    *)
      if [ "$status" -eq 137 ]; then
        echo "error: killed; perhaps for its memory (resources.memory, or --slurm mem=...)" >&2
      fi
      ;;
  esac
  exit "$status"
}

# Writes manifest and report where every task of the lists has ended well, and says which have not where some have not.
finish() {
  local list count number lacking=0
  while [ "$#" -gt 0 ]; do
    list=$1 count=$2
    shift 2
    for ((number = 1; number <= count; number++)); do
      if ! [ -e "$here/done/$list.$number" ]; then
        echo "not finished: task $number of $list" >&2
        lacking=$((lacking + 1))
      fi
    done
  done
  if [ "$lacking" -gt 0 ]; then
    echo "error: $lacking tasks did not end well; $here/logs says why. Mend the cause, export again and submit." >&2
    exit 1
  fi
  attend "${lingraft[@]}" run "$experiment" ${said[@]+"${said[@]}"} --store "$store" --out "$out"
}
