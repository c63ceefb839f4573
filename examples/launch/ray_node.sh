#!/usr/bin/env bash
# One node of the Ray cluster of a Slurm job, until it is ended. MASTER_ADDR, MASTER_PORT: the head.
set -euo pipefail
trap '' USR1  # it is for the run
FOLDER=/tmp/ray-$SLURM_JOB_ID  # short: it holds sockets
HOW=(--block --disable-usage-stats "--address=$RAY_ADDRESS")
if [ "$SLURM_NODEID" = 0 ]; then
    HOW=(
        --block --disable-usage-stats --head "--node-ip-address=$MASTER_ADDR"
        "--port=$MASTER_PORT" --include-dashboard=false "--temp-dir=$FOLDER"
    )
fi
ray start "${HOW[@]}" &
RAY=$!
trap 'kill "$RAY"' TERM INT
CODE=0
while kill -0 "$RAY" 2> /dev/null; do  # a trap ends the wait, too
    wait "$RAY" && CODE=0 || CODE=$?
done
rm -rf "$FOLDER"
exit "$CODE"
