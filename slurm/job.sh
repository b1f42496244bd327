# shellcheck shell=bash
# What the batch files share; they source it, with what they were given. Needs bash 5.
# Of theirs: LTE_PYTHON, the interpreter that has lte; MOST_WORKERS, where there is a server.

: "${1:?no recipe was given: sbatch FILE CONFIG [key=value ...]}"
recipe=("$@")
server='' workers='' # process ids
told=''              # whether SLURM wants this job to end
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

lives() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }

# Have the server save and leave.
tell_server() { if lives "$server"; then kill -USR1 "$server" 2>/dev/null || true; fi; }

# Have the workers save and leave: srun passes it on. If this is what the job was before, on a node that was cut
# off, its srun would reach the new ones: a job that is started again has the same number, and its steps, too. So
# would the child of srun that cancels the step if srun is killed: that one goes first.
tell_workers() {
  if ! lives "$workers"; then return; fi
  if is_ours; then
    kill -USR1 "$workers" 2>/dev/null || true
  else
    pkill -KILL --parent "$workers" || true
    kill -KILL "$workers" 2>/dev/null || true
  fi
}

# SLURM says that time is nearly up (--signal), or the machine is wanted. Workers leave after the server, which
# would go on without them else.
leave_soon() {
  told=yes
  if lives "$server"; then tell_server; else tell_workers; fi
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
  srun --kill-on-bad-exit=0 --wait=0 "${options[@]}" "$LTE_PYTHON" -m launch.slurm worker "$@" "${recipe[@]}" &
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
    ended "$workers" || { code=$? && was_told "$code" && tell_server; }
    ended "$server" || server_code=$?
  else
    ended "$server" || { server_code=$? && was_told "$server_code" && tell_workers; }
    ended "$workers" || true
  fi
  if [ "$server_code" = 0 ]; then exit 0; fi
  if [ "$code" = 0 ]; then code=$server_code; fi
  leave "$code"
}

# Note whether an exit code says that SLURM ended the process, by SIGUSR1 or SIGTERM, and not this shell.
was_told() { if [ "$1" = 138 ] || [ "$1" = 143 ]; then told=yes; fi; }

# End this job with an exit code; if SLURM had it leave before the run was over, it starts again, unless that is
# decided already.
leave() {
  if [ -n "$told" ] && is_ours; then
    echo "lte: not finished; job $job is queued again"
    scontrol requeue "$job" || echo "lte: SLURM refused to; submit the same command again, which goes on" >&2
  fi
  exit "$1"
}

# Whether SLURM runs this job, and here: nobody cancelled it, and this is not what it was before SLURM started it
# again, on a node that was cut off. A controller with much to do, as when it preempts many, is asked again.
is_ours() {
  local said state restarts asked=1
  until said=$(squeue --noheader --jobs="$job" --Format=State,RestartCnt 2>&1); do
    if [[ $said == *"Invalid job id"* ]]; then return 1; fi
    if [ "$asked" -ge 6 ]; then
      echo "lte: SLURM does not answer ($said): job $job is left to it; if it is gone, submit the same command again" >&2
      return 1
    fi
    asked=$((asked + 1))
    sleep 2
  done
  read -r state restarts <<<"$said"
  [ "$state" = RUNNING ] && [ "$restarts" = "${SLURM_RESTART_COUNT:-0}" ]
}
