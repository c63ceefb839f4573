#!/usr/bin/env bash
# The quickstart's last training with the estimator of group_median.py; run examples/quickstart first.
# Arguments are overrides: examples/custom_estimator/run.sh trainer.total_training_steps=20
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-$PWD/../../outputs/quickstart}
MCORE_RL_PLUGINS=group_median OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
    python -m mcore_rl.train --config-name quickstart algorithm.adv_estimator=group_median \
    model.path="$OUT/sft/hf_model" data.train_files="$OUT/data/train.parquet" \
    data.val_files="$OUT/data/val.parquet" trainer.default_local_dir="$OUT/group_median" "$@"
