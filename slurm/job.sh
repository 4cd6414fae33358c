# Sourced by the job files: go where the job was sent from, prepare what the site needs, and `stage`, which runs one stage of a run
# so that nothing is lost when the job is pre-empted, runs out of time, or its node goes away.
# shellcheck shell=bash
: "${SLURM_JOB_ID:?send this file with sbatch}"
cd "${SLURM_SUBMIT_DIR:-$PWD}"

# What `causal-meta run` sends has the site's values already; a file that is sent by hand reads them here.
site=${CAUSAL_META_SITE:-$jobs/site.env}
if [ -z "${CAUSAL_META_SENT:-}" ] && [ -f "$site" ]; then set -a; source "$site"; set +a; fi
if [ -n "${SITE_PROLOGUE:-}" ]; then set +u; eval "$SITE_PROLOGUE"; set -u; fi # modules seldom bear -u

python=${CAUSAL_META_PYTHON:-$jobs/../.venv/bin/python}
command -v "$python" >/dev/null || { echo "there is no '$python': run scripts/setup, or name an interpreter in CAUSAL_META_PYTHON" >&2; exit 2; }
unset MPLBACKEND # a notebook chooses its own: with `agg` its figures vanish
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun no longer takes from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # the number of one task of an array may be that of the whole
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
say() { printf '%s  job %s, restart %s: %s\n' "$(date -u +%FT%TZ)" "$job" "$restarts" "$*"; }

# Signals reach the ranks, which save and stop; the shell must outlive them, to put the job back into the queue.
trap ':' USR1 TERM

# Work that this job did before on a node which was lost may still be going on there: wait for its lock.
[ "$restarts" = 0 ] || export CAUSAL_META_PATIENCE=${CAUSAL_META_PATIENCE:-3600}

# Ranks meet at the first node of the job, at a port of this job and start. A node whose name does not resolve has an address in SLURM's books.
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  getent hosts "$first" >/dev/null || first=$(scontrol -o show node "$first" | grep -oE 'NodeAddr=[^ ]+' | cut -d= -f2)
  export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID + 7919 * restarts) % 20000))}
fi

done_by_us() { # RECORD: does it say that the stage is done, and by this job?
  grep -q '"state": "done"' "$1" 2>/dev/null && grep -q "\"job\": \"$job\"" "$1"
}

go_back() { # into the queue, to go on from there
  local try now
  if [ "$restarts" -ge "${CAUSAL_META_MOST_RESTARTS:-100}" ]; then say "was put back $restarts times and is not done: giving up"; return 1; fi
  # a job that has started anew elsewhere must not be disturbed by what is left of it here
  now=$(scontrol -o show job "$job" 2>/dev/null | grep -oE 'Restarts=[0-9]+' | cut -d= -f2 || true)
  if [ -n "$now" ] && [ "$now" != "$restarts" ]; then say "has been started anew already"; return 1; fi
  say "not done; going back into the queue"
  for try in 1 2 3 4 5; do
    if scontrol requeue "$job" || scontrol -o show job "$job" | grep -q 'JobState=PENDING'; then return 0; fi # it may be pending already
    sleep "$try"
  done
  say "could not go back: send the same command again, it will go on from here"
  return 1
}

stage() { # RUN NAME COMMAND...: run a stage as a step of this job, on one rank if `alone` is set. What counts is its record, RUN/stages/NAME.json, not an exit code.
  local run=$1 record=$1/stages/$2.json status=0 layout=()
  shift 2
  [ -f "$run/config.yaml" ] || { echo "there is no run in '$run': name its folder, such as experiments/smoke_test" >&2; exit 2; }
  mkdir -p "$run/stages"
  [ -z "${alone:-}" ] || layout=(--nodes=1 --ntasks=1)
  if [ "$restarts" != 0 ] && done_by_us "$record"; then say "$record is done"; return; fi
  [ "$restarts" != 0 ] || rm -f "$record" # of an earlier job, which may have had our number on a cluster that was set up anew
  export CAUSAL_META_ASKED=$run/stages/.asked-$job # made by a rank that hears a signal
  rm -f "$CAUSAL_META_ASKED"
  say "$*"
  srun --kill-on-bad-exit=1 "${layout[@]}" "$python" -m causal_meta "$@" || status=$?
  if done_by_us "$record"; then rm -f "$CAUSAL_META_ASKED"; return; fi
  # 85: stopped and saved. 138, 143: USR1 or TERM came before the program could hear it.
  if [ -e "$CAUSAL_META_ASKED" ] || [ "$status" = 85 ] || [ "$status" = 138 ] || [ "$status" = 143 ]; then
    rm -f "$CAUSAL_META_ASKED"
    go_back || true
    exit 85
  fi
  say "failed with code $status; $record says how it stands"
  exit $((status == 0 ? 1 : status))
}
