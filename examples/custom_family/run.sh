#!/usr/bin/env bash
# Convert, check and train a tiny MiMo by the family of mimo.py; run examples/quickstart first.
# Arguments are overrides of the training: examples/custom_family/run.sh trainer.total_training_steps=2
set -euo pipefail
cd "$(dirname "$0")"
OUT=${OUT:-$PWD/../../outputs/quickstart}
export MCORE_RL_PLUGINS=mimo OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
rm -rf "$OUT/mimo"
python make_model.py "$OUT/base" "$OUT/mimo/base"
# Every tensor bit by bit, and the logits of Megatron and transformers.
python -m mcore_rl.cli convert hf-to-mcore "$OUT/mimo/base" "$OUT/mimo/mcore" --verify
# Log-probabilities and layers of Megatron, transformers and vLLM, and what vLLM holds after a sync.
python -m mcore_rl.cli verify model --model "$OUT/mimo/base" --layout tp2
python -m mcore_rl.train --config-name gmpo model.path="$OUT/mimo/base" \
    data.train_files="$OUT/data/train.parquet" data.val_files="$OUT/data/val.parquet" \
    data.train_batch_size=8 data.max_prompt_length=16 data.max_response_length=8 \
    actor.ppo_mini_batch_size=8 actor.megatron.dtype=float32 rollout.n=4 \
    rollout.kv_cache_memory_bytes=33554432 trainer.total_training_steps=4 \
    trainer.default_local_dir="$OUT/mimo/run" "$@"
