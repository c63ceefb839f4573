"""The checks before the first step: engines have loaded the trainer's weights, and give the same
log-probabilities.

The second runs right after the weight sync, on a few prompts. A difference beyond rounding means
wrong or stale weights, another temperature or another tokenization, and every later update would be
wrong. The allowed differences are in `tolerances.py`.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.errors import WeightSyncError
from mcore_rl.loop.generate import answered_groups, ask_for_groups
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.tolerances import AFTER_SYNC, SHARES

logger = logging.getLogger(__name__)

NUM_PROMPTS = 8
MAX_TOKENS = 32
_COUNTED = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""For each of these differences, the tokens that differ by more are counted."""


def sync_first_weights(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int) -> None:
    """Give the engines the first weights, as version `step`, and check that they have them."""
    if cfg.rollout.compare_loaded_weights:
        # A merged adapter that adds zeros turns a -0.0 into 0.0.
        is_of_folder = step == 0 and cfg.model.lora is None
        wanted = cluster.engines.digests_of_model() if is_of_folder else None
        num = cluster.engines.sync_and_compare(step, wanted)
        where = "as the model's folder has them" if is_of_folder else "the same in all engines"
        logger.info("%d loaded parameters of an engine are %s, bit by bit", num, where)
    else:
        cluster.engines.sync_weights(step)
    check_agreement(cfg, inputs, cluster, step)


def check_agreement(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int) -> float:
    """Return the largest difference of log-probabilities between engines and trainer.

    Raises:
        RolloutError: if the engines were asked for routes and return none, or impossible ones.
        WeightSyncError: if they exceed what `rollout.logprob_tolerance` allows.
    """
    # Groups of equal cost go to the engines in turn: each engine is checked on each prompt.
    prompts = [
        prompt
        for prompt in inputs.prompts.peek(NUM_PROMPTS)
        for _ in range(cluster.engines.num_engines)
    ]
    asked = ask_for_groups(
        cluster,
        prompts,
        1,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        max_tokens=min(MAX_TOKENS, cfg.data.max_response_length),
        seed=f"{cfg.data.seed}:agreement",
        keep_routes=inputs.routing is not None,
    )
    groups = answered_groups(cluster, asked)
    samples = [sample for group in groups for sample in group.samples]
    by_trainer = cluster.trainer.logprobs([sample.to_sequence() for sample in samples])
    by_engine = np.concatenate([sample.rollout_logprobs for sample in samples])
    drawn = np.concatenate([sample.loss_mask for sample in samples])  # 0 in both for prompt tokens
    differences = np.abs(np.concatenate(by_trainer).astype(np.float64) - by_engine)[drawn]
    found = summary(differences)
    dtype = cfg.actor.megatron.dtype
    problem = disagreement(found, dtype, cfg.rollout.logprob_tolerance)
    if problem:
        raise WeightSyncError(
            f"engine and trainer differ in the log-probabilities of tokens right after a weight "
            f"sync: {problem} (rollout.logprob_tolerance); {counts(differences)}. "
            f"{_next_step(cfg)}",
            role="controller",
            step=step,
        )
    logger.info(
        "engine and trainer agree: log-probabilities differ by at most %.2g, %.2g in the mean; %s",
        found["the largest"],
        found["the mean"],
        counts(differences),
    )
    return found["the largest"]


def _next_step(cfg: RunConfig) -> str:
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size).name
    option = f" --layout {layout}" if layout else ""
    command = f"mcore-rl verify model --model {shlex.quote(cfg.model.folder)}{option}"
    return f"Which of the two departs from transformers, and in which layer: {command}"


def summary(differences: ArrayLike) -> dict[str, float]:
    """Return statistics of the differences: the keys of SHARES. One NaN makes all of them NaN.

    Args:
        differences: absolute, of one token each; at least one.
    """
    array = np.asarray(differences, dtype=np.float64)
    median, nine_of_ten = np.quantile(array, (0.5, 0.9))
    numbers = (median, array.mean(), nine_of_ten, array.max())
    return {name: float(number) for name, number in zip(SHARES, numbers, strict=True)}


def counts(differences: np.ndarray) -> str:
    """Return how many tokens differ by how much: "of 200 tokens 31 by more than 0.01".

    Args:
        differences: [tokens], absolute.
    """
    over = [(int((differences > limit).sum()), limit) for limit in _COUNTED]
    texts = [f"{num} by more than {limit:g}" for num, limit in over if num]
    return (
        f"of {len(differences)} tokens {', '.join(texts) or f'none by more than {_COUNTED[0]:g}'}"
    )


def disagreement(found: Mapping[str, float], dtype: str, tolerance: float | None) -> str:
    """Return which of the numbers of `summary` is too large; "" where none is.

    Args:
        found: of the differences.
        dtype: of the trainer.
        tolerance: of the largest difference; None: that of the dtype.
    """
    usual = AFTER_SYNC[dtype]
    if tolerance is None:
        tolerance = usual
    for name, share in SHARES.items():
        # A smaller tolerance of the largest difference does not change the rounding of most tokens.
        limit = min(tolerance, max(tolerance, usual) * share)
        is_read = dtype != "float32" or name == "the largest"
        if is_read and not found[name] <= limit:  # NaN fails too
            return f"{name} by {found[name]:.3g}, more than {limit:.3g}"
    return ""
