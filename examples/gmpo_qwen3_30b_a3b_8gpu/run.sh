#!/usr/bin/env bash
# 8 devices. MODEL=... TRAIN_DATA=... VAL_DATA=... gmpo_qwen3_30b_a3b_8gpu/run.sh
set -euo pipefail
export NNODES=${NNODES:-1}
exec "$(dirname "$0")/../launch/torchrun.sh" "${RECIPE:-gmpo_qwen3_30b_a3b_8gpu}" "$@"
