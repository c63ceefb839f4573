#!/usr/bin/env bash
# 16 nodes of 8 devices. On every node: MODEL=... TRAIN_DATA=... VAL_DATA=... dapo_qwen2_5_32b/run.sh
set -euo pipefail
export NNODES=${NNODES:-16}
exec "$(dirname "$0")/../launch/torchrun.sh" "${RECIPE:-dapo_qwen2_5_32b}" "$@"
