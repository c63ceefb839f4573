#!/usr/bin/env bash
# 8 devices. On every node: MODEL=... TRAIN_DATA=... VAL_DATA=... gmpo_qwen2_5_7b/run.sh
set -euo pipefail
export NNODES=${NNODES:-1}
exec "$(dirname "$0")/../launch/torchrun.sh" "${RECIPE:-gmpo_qwen2_5_7b}" "$@"
