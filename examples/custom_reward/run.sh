#!/usr/bin/env bash
# The quickstart's last training with the reward of digits_right.py; run examples/quickstart first.
# Arguments are overrides: examples/custom_reward/run.sh trainer.total_training_steps=20
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-$PWD/../../outputs/quickstart}
for NAME in train val; do
    python make_rows.py "$OUT/data/$NAME.parquet" "$OUT/digits_right/$NAME.parquet"
done
MCORE_RL_PLUGINS=digits_right OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
    python -m mcore_rl.train --config-name quickstart \
    model.path="$OUT/sft/hf_model" data.train_files="$OUT/digits_right/train.parquet" \
    data.val_files="$OUT/digits_right/val.parquet" \
    trainer.default_local_dir="$OUT/digits_right/run" "$@"
