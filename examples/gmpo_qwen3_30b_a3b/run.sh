#!/usr/bin/env bash
# 8 nodes of 8 devices. On every node: MODEL=... TRAIN_DATA=... VAL_DATA=... gmpo_qwen3_30b_a3b/run.sh
set -euo pipefail
export NNODES=${NNODES:-8}
exec "$(dirname "$0")/../launch/torchrun.sh" "${RECIPE:-gmpo_qwen3_30b_a3b}" "$@"
