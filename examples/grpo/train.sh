#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=examples/launch/quoted.sh
. "$(dirname "$0")/../launch/quoted.sh"

usage() {
    cat <<'END'
GRPO from one command, on GPUs or on CPU.

    ./train.sh --model M [options] [any override of the configuration: key=value]

    --model M          Hugging Face folder, or a name of the hub such as Qwen/Qwen2.5-7B, which is
                       downloaded only with HF_HUB_OFFLINE=0 (MODEL)
    --train_data F     Parquet, JSON array or JSON lines, or a list "['a.json','b.json']"
                       (TRAIN_DATA, data/train.json)
    --val_data F       the same for validation; without it there is none (VAL_DATA)
    --reward_func F    Python file with compute_score(data_source, solution_str, ground_truth,
                       extra_info=None); without it the data's data_source names the reward
    --rollout_n N      samples per prompt (ROLLOUT_N, 5)
    --epochs N         passes over the data (TOTAL_EPOCHS, 15)
    --lr X             learning rate (LEARNING_RATE, 1e-6)
    --kl_coef X        weight of the KL in the loss (KL_LOSS_COEF, 0.001)
    --n_gpus N         processes, one per device (N_GPUS; all GPUs of this machine, on CPU 1)
    --output DIR       run folder (OUTPUT, ./outputs/checkpoints)
    --cfg job          print the configuration and stop
    --help

In capitals: the environment variable that gives the default, and its own default. Besides:

    NORM_ADV_BY_STD=true     divide advantages by the group's deviation; false: Dr.GRPO's advantage
    USE_KL_LOSS=true         KL against the first model in the loss
    KL_LOSS_TYPE=low_var_kl  its estimator
    TRAIN_BATCH_SIZE=256     prompts per step
    MINI_BATCH_SIZE          prompts per optimizer update (TRAIN_BATCH_SIZE)
    MAX_PROMPT_LENGTH=1024   tokens
    MAX_RESPONSE_LENGTH=1024 tokens
END
}

fail() {
    echo "error: $*" >&2
    exit 2
}

GPUS_HERE=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
MODEL=${MODEL:-}
TRAIN_DATA=${TRAIN_DATA:-data/train.json}
VAL_DATA=${VAL_DATA:-}
REWARD_FUNC=${REWARD_FUNC:-}
ROLLOUT_N=${ROLLOUT_N:-5}
TOTAL_EPOCHS=${TOTAL_EPOCHS:-15}
LEARNING_RATE=${LEARNING_RATE:-1e-6}
KL_LOSS_COEF=${KL_LOSS_COEF:-0.001}
KL_LOSS_TYPE=${KL_LOSS_TYPE:-low_var_kl}
USE_KL_LOSS=${USE_KL_LOSS:-true}
NORM_ADV_BY_STD=${NORM_ADV_BY_STD:-true}
N_GPUS=${N_GPUS:-$((GPUS_HERE > 0 ? GPUS_HERE : 1))}
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-256}
MINI_BATCH_SIZE=${MINI_BATCH_SIZE:-$TRAIN_BATCH_SIZE}
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-1024}
MAX_RESPONSE_LENGTH=${MAX_RESPONSE_LENGTH:-1024}
OUTPUT=${OUTPUT:-./outputs/checkpoints}

OVERRIDES=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
        --model) NAME=MODEL ;;
        --train_data) NAME=TRAIN_DATA ;;
        --val_data) NAME=VAL_DATA ;;
        --reward_func) NAME=REWARD_FUNC ;;
        --rollout_n) NAME=ROLLOUT_N ;;
        --epochs) NAME=TOTAL_EPOCHS ;;
        --lr) NAME=LEARNING_RATE ;;
        --kl_coef) NAME=KL_LOSS_COEF ;;
        --n_gpus) NAME=N_GPUS ;;
        --output) NAME=OUTPUT ;;
        --cfg) NAME=SHOW ;;
        -*) fail "$1 is no option; see $0 --help" ;;
        *=*) OVERRIDES+=("$1"); shift; continue ;;
        *) fail "$1 is neither an option nor key=value; see $0 --help" ;;
    esac
    [ $# -gt 1 ] || fail "$1 needs a value"
    printf -v "$NAME" %s "$2"
    shift 2
done
[ -n "$MODEL" ] || fail "--model is missing; see $0 --help"

ARGS=(
    "model.path=$(quoted "$MODEL")"
    "data.train_files=$(quoted "$TRAIN_DATA")"
    "data.train_batch_size=$TRAIN_BATCH_SIZE"
    "data.max_prompt_length=$MAX_PROMPT_LENGTH"
    "data.max_response_length=$MAX_RESPONSE_LENGTH"
    "algorithm.norm_adv_by_std_in_grpo=$NORM_ADV_BY_STD"
    "actor.ppo_mini_batch_size=$MINI_BATCH_SIZE"
    "actor.optim.lr=$LEARNING_RATE"
    "actor.use_kl_loss=$USE_KL_LOSS"
    "actor.kl_loss_coef=$KL_LOSS_COEF"
    "actor.kl_loss_type=$KL_LOSS_TYPE"
    "rollout.n=$ROLLOUT_N"
    "trainer.total_epochs=$TOTAL_EPOCHS"
    "trainer.n_gpus_per_node=$N_GPUS"
    "trainer.default_local_dir=$(quoted "$OUTPUT")"
)
[ -z "$VAL_DATA" ] || ARGS+=("data.val_files=$(quoted "$VAL_DATA")")
[ -z "$REWARD_FUNC" ] || ARGS+=("custom_reward_function.path=$(quoted "$REWARD_FUNC")")
[ "$GPUS_HERE" -gt 0 ] || ARGS+=("actor.megatron.dtype=float32")

exec python -m mcore_rl.train --config-name grpo ${SHOW:+--cfg "$SHOW"} "${ARGS[@]}" \
    ${OVERRIDES[@]+"${OVERRIDES[@]}"}
