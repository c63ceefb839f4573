#!/usr/bin/env bash
# The quickstart's last training with the engine of transformers_engine.py; run examples/quickstart
# first. It draws token by token, so a few steps are enough. Arguments are overrides.
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-$PWD/../../outputs/quickstart}
MCORE_RL_PLUGINS=transformers_engine OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
    python -m mcore_rl.train --config-name quickstart rollout.name=transformers \
    model.path="$OUT/sft/hf_model" data.train_files="$OUT/data/train.parquet" \
    data.val_files="$OUT/data/val.parquet" trainer.default_local_dir="$OUT/transformers_engine" \
    data.train_batch_size=16 actor.ppo_mini_batch_size=16 data.val_max_samples=16 \
    trainer.total_training_steps=2 "$@"
