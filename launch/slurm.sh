#!/usr/bin/env bash
# The whole pipeline on a Slurm cluster. In the root of the repository, in a folder that all nodes see:
#
#     make setup                     # once, where a Python package index can be reached
#     sbatch launch/slurm.sh         # or with other options: sbatch --nodes=4 --time=2:00:00 launch/slurm.sh
#
# One node prepares the tokens, all nodes train, one node evaluates, exports and pushes.
#
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # a torchrun, which starts one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --exclusive             # all cores of the nodes, and no other job on the port
#SBATCH --mem=0                 # all memory
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append      # a job that starts again keeps its log
#SBATCH --requeue               # Slurm starts it again after a preemption, or when a node fails
#SBATCH --signal=B:USR1@180     # to this script alone, this many seconds before the time limit
set -euo pipefail

# The environment can set these: MAX_RESTARTS=0 sbatch launch/slurm.sh
PROCESSES_PER_NODE="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
PORT="${PORT:-29500}"
MAX_RESTARTS="${MAX_RESTARTS:-3}"   # of the processes, when one of them fails
STOP_SECONDS="${STOP_SECONDS:-120}" # for the last checkpoint; less than in --signal
VENV="${VENV:-.venv}"

cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f dvc.yaml ] || [ ! -f "$VENV/bin/activate" ]; then
  echo "error: no dvc.yaml or no $VENV in $PWD; run make setup and sbatch in the root of the repository" >&2
  exit 2
fi
# shellcheck source=/dev/null
. "$VENV/bin/activate"

# USR1: the time is nearly over. scancel sends a signal to the processes on the nodes; one to srun would kill them. They
# get it once: after a second signal, torchrun does not wait for its workers.
out_of_time=
stop() {
  [ -z "$out_of_time" ] || return 0
  out_of_time=yes
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap stop USR1
trap : TERM # Slurm ends the job. It has told the processes; this script waits for them

# Whether Slurm preempts this job. It starts the job again only if this script still runs when the grace time is over.
is_preempted() {
  [[ "$(scontrol show job "$SLURM_JOB_ID")" =~ PreemptTime=[0-9] ]]
}

# Runs a command on nodes. If that fails, the job ends with its exit code, or starts again.
run() {
  local code=0
  if [ -z "$out_of_time" ]; then
    srun --kill-on-bad-exit=0 --cpu-bind=none "$@" &
    while true; do
      code=0
      wait $! || code=$?
      kill -0 $! 2>/dev/null || break # else a signal interrupted `wait`
    done
  fi
  if [ -n "$out_of_time" ] || { [ "$code" -ne 0 ] && is_preempted; }; then
    echo "interrupted; the job starts again, and resumes"
    scontrol requeue "$SLURM_JOB_ID"
    exit 143
  fi
  [ "$code" -eq 0 ] || exit "$code"
}

# torchrun gives rank 0 to the first name in alphabetical order
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | LC_ALL=C sort | sed -n 1p)
one_node=(--nodes=1 --ntasks=1 --nodelist="$first")
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$STOP_SECONDS"

run "${one_node[@]}" dvc repro tokenize

# --wait: when one node has ended, the others have this many seconds to write the checkpoint
run --wait="$((STOP_SECONDS + 30))" \
  torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$PROCESSES_PER_NODE" --max-restarts="$MAX_RESTARTS" \
  --rdzv-backend=c10d --rdzv-endpoint="$first:$PORT" --rdzv-id="$SLURM_JOB_ID" -m stages.train

run "${one_node[@]}" dvc repro # training is complete: its results are taken from the checkpoints

if dvc remote default &>/dev/null; then
  run "${one_node[@]}" dvc push
else
  echo "no dvc push: DVC has no default remote; the results are in $PWD"
fi
