#!/usr/bin/env bash
# Queues a recipe with Slurm, from the root of the repository:
#
#   examples/launch/submit.sh RECIPE [key=value ...]
#
#   MODEL, TRAIN_DATA, VAL_DATA     see recipe.sh
#   LAUNCHER=torchrun               or ray: a Ray cluster on the job's nodes
#   SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...    sbatch's own; job.sbatch has the rest
#
# Nodes and devices are those of the configuration. The job ends by saving before its time is up, is
# queued again and goes on.
set -euo pipefail
LAUNCH=$(dirname "$0")
# shellcheck source=examples/launch/recipe.sh
. "$LAUNCH/recipe.sh"
export LAUNCHER=${LAUNCHER:-torchrun}
[ -f "$LAUNCH/slurm_$LAUNCHER.sh" ] || { echo "error: LAUNCHER=$LAUNCHER is not torchrun or ray" >&2; exit 2; }
exec sbatch --job-name="$RECIPE" --nodes="$NNODES" --gpus-per-node="$GPUS_PER_NODE" \
    "$LAUNCH/job.sbatch" "$@"
