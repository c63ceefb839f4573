#!/usr/bin/env bash
# From nothing to a trained model on two CPU cores: model, data, warm start, GMPO, check.
# Arguments are overrides of the last training: examples/quickstart/run.sh trainer.total_training_steps=20
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-outputs/quickstart}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "1/5 model and data in $OUT"
[ -d "$OUT/base" ] || python examples/quickstart/make_model.py --out "$OUT/base"
[ -d "$OUT/data" ] || python examples/quickstart/make_data.py --out "$OUT/data"

echo "2/5 supervised warm start"
python -m mcore_rl.sft --config-name quickstart_sft \
    model.path="$OUT/base" data.train_files="$OUT/data/sft.parquet" \
    trainer.default_local_dir="$OUT/sft"

echo "3/5 reinforcement learning"
train() {
    python -m mcore_rl.train --config-name quickstart \
        model.path="$OUT/sft/hf_model" \
        data.train_files="$OUT/data/train.parquet" data.val_files="$OUT/data/val.parquet" \
        trainer.default_local_dir="$OUT/\${trainer.experiment_name}" "$@"
}
train "$@"
RUN=$(train "$@" --cfg job | sed -n 's/^ *default_local_dir: //p')

echo "4/5 the exported model in plain transformers"
python examples/quickstart/check_model.py --run "$RUN" --data "$OUT/data/val.parquet"

echo "5/5 done"
echo "  run folder  $RUN   (config.yaml, metrics.jsonl, samples.jsonl, checkpoints/)"
echo "  report      $RUN/report.html"
echo "  model       $RUN/hf_model"
