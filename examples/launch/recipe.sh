# shellcheck shell=bash disable=SC2034
# Read by the scripts that start a recipe: reads their arguments RECIPE [key=value ...] and, of the
# environment,
#
#   MODEL                  Hugging Face folder, or a name of the hub (HF_HUB_OFFLINE=0: downloaded)
#   TRAIN_DATA, VAL_DATA   a file, or a list "['a','b']"
#
# into COMMAND, the arguments of mcore_rl.train, and has the configuration composed: a mistake in
# it is said here. How many nodes and devices, the configuration says; keys change it.
# shellcheck source=examples/launch/quoted.sh
. "$LAUNCH/quoted.sh"

[ $# -gt 0 ] || { echo "error: name a recipe: a file of configs/, without .yaml" >&2; exit 2; }
RECIPE=$1
for name in MODEL TRAIN_DATA VAL_DATA; do
    [ -n "${!name:-}" ] || { echo "error: set $name; see examples/launch/recipe.sh" >&2; exit 2; }
done
COMMAND=(
    --config-name "$RECIPE" "model.path=$(quoted "$MODEL")"
    "data.train_files=$(quoted "$TRAIN_DATA")" "data.val_files=$(quoted "$VAL_DATA")" "${@:2}"
)
SETTINGS=$(python -m mcore_rl.train "${COMMAND[@]}" --cfg job)

# setting SECTION KEY: its value in the composed configuration.
setting() {
    awk -v section="$1:" -v key="$2:" \
        '/^[^ ]/ { found = $1 } found == section && $1 == key { print $2; exit }' <<< "$SETTINGS"
}
NNODES=$(setting trainer nnodes)
GPUS_PER_NODE=$(setting trainer n_gpus_per_node)
