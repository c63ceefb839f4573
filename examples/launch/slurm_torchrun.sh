# shellcheck shell=bash disable=SC2034
# Read by job.sbatch: runs run.sh on every node. srun passes the signal on to it.
MCORE_RL_CHANNEL_SECRET=$(secret)
export MCORE_RL_CHANNEL_SECRET
# shellcheck disable=SC2016  # each node has a number of its own
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' node "$LAUNCH/run.sh" "$@" &
RUN=$!
