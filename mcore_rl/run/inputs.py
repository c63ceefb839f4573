"""Everything that a run reads before any worker starts, so that bad input stops it early."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_rl.algorithms.filter_groups import KNOWN_METRICS, FilterGroupsConfig
from mcore_rl.config.run import RunConfig, SftRunConfig, TrainerConfig, train_layout
from mcore_rl.data.chat import end_token_ids, load_tokenizer, token_texts
from mcore_rl.data.prompts import DataConfig, ItemStream, load_prompts, load_sft_sequences
from mcore_rl.data.vocabulary import check_vocabulary
from mcore_rl.errors import UserError, closest_hint, require
from mcore_rl.loop.inputs import RunInputs, SftInputs
from mcore_rl.megatron.overrides import check_architecture
from mcore_rl.models.layout import check_engine_layout, check_layout
from mcore_rl.models.rope import check_length, max_positions
from mcore_rl.models.spec import check_weights, load_hf_config, model_family, routing
from mcore_rl.models.value_head import check_value_weights
from mcore_rl.observability.trackers import TRACKERS
from mcore_rl.rewards.score import RewardScorer
from mcore_rl.rollout.base import ENGINES
from mcore_rl.run.adapters import adapters_of_engines
from mcore_rl.types import Prompt, Routing

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


def load_run_inputs(cfg: RunConfig) -> RunInputs:
    """Read model config, tokenizer, data and rewards.

    Raises:
        UserError: one line for whatever is missing, malformed or does not fit together.
    """
    tokenizer = _load_model_side(cfg)
    if cfg.has_critic:
        _check_critic(cfg)
    scorer = RewardScorer(cfg.reward, cfg.custom_reward_function)
    prompts, val_prompts = [], []
    if cfg.data.train_files is not None:
        prompts = load_prompts(
            cfg.data.train_files, cfg.data, tokenizer, cfg.data.train_max_samples
        )
    if cfg.data.val_files is not None:
        val_prompts = load_prompts(
            cfg.data.val_files, cfg.data, tokenizer, cfg.data.val_max_samples
        )
    scorer.check([*prompts, *val_prompts])
    scorer.check_ground_truths([*prompts, *val_prompts])
    _check_filter(cfg.algorithm.filter_groups, scorer, prompts)
    _check_best_metric(cfg.trainer.best_ckpt_metric, val_prompts)
    # An evaluation has no training data: engines are checked on the validation prompts.
    trains = cfg.data.train_files is not None
    items = prompts if trains else val_prompts
    stream = ItemStream(items, seed=cfg.data.seed, shuffle=cfg.data.shuffle)
    return RunInputs(
        prompts=stream,
        val_prompts=val_prompts,
        scorer=scorer,
        stop_token_ids=end_token_ids(tokenizer, read_generation_config(cfg.model.folder)),
        token_texts=partial(token_texts, tokenizer),
        total_steps=count_steps(cfg.trainer, cfg.data, stream) if trains else 0,
        routing=_replayed_routing(cfg),
        adapters=adapters_of_engines(cfg),
    )


def _check_filter(cfg: FilterGroupsConfig, scorer: RewardScorer, prompts: Sequence[Prompt]) -> None:
    """Raise a UserError if groups are to be compared by a number that no reward gives."""
    metric = cfg.metric
    if not cfg.enable or metric in KNOWN_METRICS:
        return
    lacking = scorer.lacks(metric, prompts)
    if lacking is not None:
        raise UserError(
            f"algorithm.filter_groups.metric={metric!r} is no number of the reward of "
            f"data_source={lacking!r}.{closest_hint(metric, KNOWN_METRICS)} "
            f"Every reward gives {', '.join(KNOWN_METRICS)}."
        )


def _check_best_metric(metric: str | None, val_prompts: Sequence[Prompt]) -> None:
    """Raise a UserError if the metric is of a data source that is not validated. The loop checks
    metrics that the first step does not log."""
    sections = sorted({f"eval/{prompt.data_source}/" for prompt in val_prompts})
    require(
        metric is None or not metric.startswith("eval/") or metric.startswith(tuple(sections)),
        "trainer.best_ckpt_metric",
        metric,
        f"is of no data source in data.val_files, whose metrics begin with {', '.join(sections)}",
        f"{sections[0]}accuracy, for example." if sections else "",
    )


def load_sft_inputs(cfg: SftRunConfig) -> SftInputs:
    """Read model config, tokenizer and data.

    Raises:
        UserError: one line for whatever is missing, malformed or does not fit together.
    """
    tokenizer = _load_model_side(cfg)
    sequences = load_sft_sequences(cfg.data.train_files, cfg.data, tokenizer)
    stream = ItemStream(sequences, seed=cfg.data.seed, shuffle=cfg.data.shuffle)
    return SftInputs(sequences=stream, total_steps=count_steps(cfg.trainer, cfg.data, stream))


def check_model(cfg: RunConfig | SftRunConfig) -> PreTrainedConfig:
    """Return the model's configuration, which fits the run's lengths and layout; weights and
    tokenizer are not needed.

    Raises:
        UserError: one line for what does not fit.
    """
    assert cfg.model.path is not None
    hf_config = load_hf_config(cfg.model.folder)
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    key = "data.max_prompt_length + data.max_response_length"
    check_length(hf_config, longest, key, "Lower one of them.")
    megatron = cfg.actor.megatron
    _check_built(hf_config, cfg)
    if isinstance(cfg, RunConfig) and ENGINES.get(cfg.rollout.name).cuts_heads:
        key = "rollout.tensor_model_parallel_size"
        check_engine_layout(hf_config, cfg.rollout.tensor_model_parallel_size, key)
    require(
        not megatron.moe_router_freeze or routing(hf_config) is not None,
        "actor.megatron.moe_router_freeze",
        megatron.moe_router_freeze,
        "has no effect: the model has no experts",
        "Leave it out.",
    )
    return hf_config


def _check_built(hf_config: PreTrainedConfig, cfg: RunConfig | SftRunConfig) -> None:
    """Raise a UserError unless Megatron can build the model in the run's layout, as it is."""
    megatron = cfg.actor.megatron
    check_layout(
        hf_config,
        train_layout(megatron, cfg.trainer.world_size),
        sequence_parallel=megatron.uses_sequence_parallel,
    )
    check_architecture(
        megatron.override_transformer_config, model_family(hf_config).transformer_kwargs(hf_config)
    )


def _load_model_side(cfg: RunConfig | SftRunConfig) -> PreTrainedTokenizerBase:
    assert cfg.model.path is not None
    for name in cfg.trainer.logger:
        TRACKERS.get(name)
    hf_config = check_model(cfg)
    check_weights(cfg.model.folder, hf_config)
    tokenizer = load_tokenizer(cfg.model.folder)
    check_vocabulary(tokenizer, hf_config.vocab_size)
    return tokenizer


def _check_critic(cfg: RunConfig) -> None:
    """Raise a UserError unless the critic can be built and read the actor's tokens."""
    key, path = "critic.model.path", cfg.critic.model.folder
    if path is None:
        return  # the actor's, which has been checked
    hf_config, actor = load_hf_config(path, key), load_hf_config(cfg.model.folder)
    require(
        hf_config.vocab_size == actor.vocab_size,
        key,
        path,
        f"has vocab_size={hf_config.vocab_size}, not {actor.vocab_size} as model.path",
        "Take a critic with the tokenizer of the model.",
    )
    require(
        max_positions(hf_config) >= cfg.data.max_prompt_length + cfg.data.max_response_length,
        key,
        path,
        f"has {max_positions(hf_config)} positions, fewer than "
        "data.max_prompt_length + data.max_response_length",
        "Lower one of them.",
    )
    _check_built(hf_config, cfg)
    check_value_weights(path, hf_config)


def _replayed_routing(cfg: RunConfig) -> Routing | None:
    mode, found = cfg.actor.router_replay.mode, routing(load_hf_config(cfg.model.folder))
    require(
        mode == "disabled" or found is not None,
        "actor.router_replay.mode",
        mode,
        "has no effect: the model has no experts",
        "Leave it out.",
    )
    return found if mode == "R3" else None


def read_generation_config(folder: str | Path) -> GenerationConfig | None:
    """Return the generation config of a model folder; None if it has none.

    Raises:
        UserError: if it cannot be read: it may add tokens that end a response, which would be lost.
    """
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    file = Path(folder) / GENERATION_CONFIG_NAME
    if not file.exists():
        return None
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is refused by transformers: {reason}") from error


def count_steps(trainer: TrainerConfig, data: DataConfig, stream: ItemStream) -> int:
    """Return the steps of the run: the configured number, or as many as the epochs contain if no
    step draws more prompts than it must.

    Raises:
        UserError: if an epoch lacks a batch, or the epochs a step.
    """
    size, drawn = data.train_batch_size, data.gen_batch_size or data.train_batch_size
    stream.num_batches_per_epoch(size)
    num_draws = trainer.total_epochs * stream.num_batches_per_epoch(drawn, "data.gen_batch_size")
    draws_per_step = -(-size // drawn)
    steps = trainer.total_training_steps or num_draws // draws_per_step
    rule = f"has fewer than the {draws_per_step} batches of {drawn} prompts that a step draws"
    require(steps > 0, "trainer.total_epochs", trainer.total_epochs, rule, "Raise it.")
    return steps
