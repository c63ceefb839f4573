#!/usr/bin/env bash
# 4 nodes of 8 devices. On every node: MODEL=... TRAIN_DATA=... VAL_DATA=... gmpo_dapo_qwen2_5_7b/run.sh
set -euo pipefail
export NNODES=${NNODES:-4}
exec "$(dirname "$0")/../launch/torchrun.sh" "${RECIPE:-gmpo_dapo_qwen2_5_7b}" "$@"
