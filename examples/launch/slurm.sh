# Read by every run.sbatch: runs a recipe's run.sh on each node of the job.
#
# Before its time is up (USR1, five minutes ahead) and when a node fails, the job is queued again and
# goes on from its last checkpoint: the run folder is the same, and trainer.resume_mode is auto.
set -euo pipefail
RUN=examples/$1/run.sh
shift
cd "$SLURM_SUBMIT_DIR"  # where sbatch was called: the root of the repository
NNODES=$SLURM_NNODES
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# Who has it may give orders to the run's processes: it goes by the environment alone.
MCORE_RL_CHANNEL_SECRET=$(od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n')
export NNODES MASTER_ADDR MASTER_PORT MCORE_RL_CHANNEL_SECRET

trap 'echo "time is up: queued again"; scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' node "$RUN" "$@" &
wait $!
