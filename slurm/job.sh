# shellcheck shell=bash
# What the batch files share; they source it, with what they were given. Needs bash 5.
# Of theirs: LTE_PYTHON, the interpreter that has lte; MOST_WORKERS, where there is a server.

: "${1:?no recipe was given: sbatch FILE CONFIG [key=value ...]}"
recipe=("$@")
server='' workers='' # process ids
told=''              # whether SLURM wants this job to end

lives() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }

# Have a process save and leave: the server by itself; srun passes it on to the workers.
tell() { if lives "$1"; then kill -USR1 "$1" 2>/dev/null || true; fi; }

# SLURM says that time is nearly up (--signal), or the machine is wanted. Workers leave after the server, which
# would go on without them else.
leave_soon() {
  told=yes
  if lives "$server"; then tell "$server"; else tell "$workers"; fi
}
trap leave_soon USR1 TERM

# Wait for the end of a process, whatever signals come meanwhile. Returns its exit code.
ended() {
  while lives "$1"; do wait "$1" || true; done
  wait "$1"
}

# Start workers: srun's options, "--", and what `launch.slurm worker` takes beside the recipe.
start_workers() {
  local options=()
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  srun --kill-on-bad-exit=0 "${options[@]}" "$LTE_PYTHON" -m launch.slurm worker "$@" "${recipe[@]}" &
  workers=$!
  if [ -n "$told" ]; then leave_soon; fi # it came before there was anyone to tell
}

# The server on this node, and its workers by srun with these options, until the run or this job ends.
serve_and_work() {
  local code=0 server_code=0 # of workers that ended first; of the server
  "$LTE_PYTHON" -m launch.slurm keys --number "$MOST_WORKERS" "${recipe[@]}"
  "$LTE_PYTHON" -m launch.slurm server "${recipe[@]}" &
  server=$!
  start_workers "$@" --
  while lives "$server" && lives "$workers"; do wait -n "$server" "$workers" || true; done
  # Whoever failed leaves the other nothing to do.
  if lives "$server"; then
    ended "$workers" || { code=$? && was_told "$code" && tell "$server"; }
    ended "$server" || server_code=$?
  else
    ended "$server" || { server_code=$? && was_told "$server_code" && tell "$workers"; }
    ended "$workers" || true
  fi
  if [ "$server_code" = 0 ]; then exit 0; fi
  if [ "$code" = 0 ]; then code=$server_code; fi
  leave "$code"
}

# Note whether an exit code says that SLURM ended the process, by SIGUSR1 or SIGTERM, and not this shell.
was_told() { if [ "$1" = 138 ] || [ "$1" = 143 ]; then told=yes; fi; }

# End this job with an exit code; if SLURM had it leave before the run was over, it starts again.
leave() {
  if [ -n "$told" ]; then again; fi
  exit "$1"
}

# Requeue this job, unless that is decided already: somebody cancelled it; or SLURM requeued it, and this is
# what it was before, on a node that was cut off.
again() {
  local job=$SLURM_JOB_ID state restarts
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  read -r state restarts <<<"$(squeue --noheader --jobs="$job" --Format=State,RestartCnt)"
  if [ "$state" = RUNNING ] && [ "$restarts" = "${SLURM_RESTART_COUNT:-0}" ]; then
    echo "lte: not finished; job $job is queued again"
    scontrol requeue "$job"
  fi
}
