#!/usr/bin/env bash
# The quickstart's last training with the loss of smooth_ratio.py; run examples/quickstart first.
# Arguments are overrides: examples/custom_loss/run.sh trainer.total_training_steps=20
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-$PWD/../../outputs/quickstart}
MCORE_RL_PLUGINS=smooth_ratio OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
    python -m mcore_rl.train --config-name quickstart actor.policy_loss.loss_mode=smooth_ratio \
    model.path="$OUT/sft/hf_model" data.train_files="$OUT/data/train.parquet" \
    data.val_files="$OUT/data/val.parquet" trainer.default_local_dir="$OUT/smooth_ratio" "$@"
