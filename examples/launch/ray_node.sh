#!/usr/bin/env bash
# One node of the Ray cluster of a Slurm job, until it is ended. MASTER_ADDR, MASTER_PORT: the head.
set -euo pipefail
trap '' USR1  # it is for the run
if [ "$SLURM_NODEID" = 0 ]; then
    exec ray start --head --block --node-ip-address="$MASTER_ADDR" --port="$MASTER_PORT" \
        --include-dashboard=false --disable-usage-stats --temp-dir="/tmp/ray-$SLURM_JOB_ID"
fi
exec ray start --block --address="$RAY_ADDRESS" --disable-usage-stats
