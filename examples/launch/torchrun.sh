#!/usr/bin/env bash
# One node's part of a recipe: examples/launch/torchrun.sh RECIPE [key=value ...]
#
#   MODEL                           Hugging Face folder, or a name of the hub (HF_HUB_OFFLINE=0: downloaded)
#   TRAIN_DATA, VAL_DATA            a file, or a list "['a','b']"
#   NNODES, GPUS_PER_NODE=8         sizes; the run.sh of a recipe gives NNODES
#   NODE_RANK=0, MASTER_ADDR, MASTER_PORT=29500    which node this is and where the first one is
#
# With trainer.dry_run=true among the arguments one process prints what the run would do.
set -euo pipefail
. "$(dirname "$0")/quoted.sh"
RECIPE=$1
shift
for name in MODEL TRAIN_DATA VAL_DATA NNODES; do
    [ -n "${!name:-}" ] || { echo "error: set $name; see examples/launch/torchrun.sh" >&2; exit 2; }
done
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
LAUNCHER=(
    torchrun --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}"
)
for argument in "$@"; do
    [ "$argument" != trainer.dry_run=true ] || LAUNCHER=(python)
done
exec "${LAUNCHER[@]}" -m mcore_rl.train --config-name "$RECIPE" \
    "model.path=$(quoted "$MODEL")" \
    "data.train_files=$(quoted "$TRAIN_DATA")" "data.val_files=$(quoted "$VAL_DATA")" \
    "trainer.nnodes=$NNODES" "trainer.n_gpus_per_node=$GPUS_PER_NODE" "$@"
