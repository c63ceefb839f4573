#!/usr/bin/env bash
# One node's part of a recipe, by torchrun: examples/launch/run.sh RECIPE [key=value ...]
#
#   MODEL, TRAIN_DATA, VAL_DATA     see recipe.sh
#   NODE_RANK=0, MASTER_ADDR, MASTER_PORT=29500    which node this is and where the first one is
#
# With trainer.dry_run=true among the arguments one process prints what the run would do. SIGUSR1
# has the run save and end: mcore_rl/loop/stop.py.
set -euo pipefail
LAUNCH=$(dirname "$0")
# shellcheck source=examples/launch/recipe.sh
. "$LAUNCH/recipe.sh"
if [ "$(setting trainer dry_run)" = true ]; then
    exec python -m mcore_rl.train "${COMMAND[@]}"
fi
# The signal is for the controller, a child of the first node's torchrun. All else begins with it
# ignored: torchrun would end by it, and Slurm may send it to every process of the node.
(
    trap '' USR1
    exec torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" \
        --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" \
        --master-port "${MASTER_PORT:-29500}" -m mcore_rl.train "${COMMAND[@]}"
) &
TORCHRUN=$!
trap 'pkill -USR1 -P "$TORCHRUN" || true' USR1
trap 'kill -TERM "$TORCHRUN"' TERM INT
CODE=0
while kill -0 "$TORCHRUN" 2> /dev/null; do  # a trap ends the wait, too
    wait "$TORCHRUN" && CODE=0 || CODE=$?
done
exit "$CODE"
