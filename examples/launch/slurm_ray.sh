# shellcheck shell=bash disable=SC2034
# Read by job.sbatch: a Ray node on every node, the first of them the head, and when all are there
# the run, which joins them. They end with the job; `ray stop`, which would end other Ray clusters
# too, is never called.
RAY_AUTH_TOKEN=$(secret)  # who does not bring it is refused
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ADDRESS="$MASTER_ADDR:$MASTER_PORT"
# shellcheck source=examples/launch/recipe.sh
. "$LAUNCH/recipe.sh"
srun --kill-on-bad-exit=1 "$LAUNCH/ray_node.sh" &
NODES=$!
until python "$LAUNCH/ray_nodes.py" "$SLURM_NNODES"; do
    kill -0 "$NODES" || { echo "error: the Ray nodes have ended, see above" >&2; exit 1; }
    sleep 5
done
python -m mcore_rl.train "${COMMAND[@]}" trainer.launcher=ray &
RUN=$!
