"""The check before the first step: engine and trainer give the same log-probabilities.

It runs right after a weight sync, on a few prompts. A difference beyond rounding means wrong or
stale weights, another temperature or another tokenization, and every later update would be wrong.
"""

from __future__ import annotations

import logging
import shlex

import numpy as np

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.errors import WeightSyncError
from mcore_rl.loop.generate import generate_groups
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.routes import check_routes

logger = logging.getLogger(__name__)

NUM_PROMPTS = 8
MAX_TOKENS = 32
TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}


def check_agreement(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int) -> float:
    """Return the largest difference of log-probabilities between engines and trainer.

    Raises:
        RolloutError: if the engines were asked for routes and return none, or impossible ones.
        WeightSyncError: if it exceeds `rollout.logprob_tolerance`.
    """
    prompts = inputs.prompts.peek(NUM_PROMPTS)
    groups = generate_groups(
        cluster,
        prompts,
        # Neighbours go to different engines: each is checked on each prompt.
        cluster.engines.num_engines,
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        max_tokens=min(MAX_TOKENS, cfg.data.max_response_length),
        seed=f"{cfg.data.seed}:agreement",
    )
    if inputs.routing is not None:
        check_routes(groups, inputs.routing, step)
    samples = [sample for group in groups for sample in group.samples]
    by_trainer = cluster.trainer.logprobs([sample.to_sequence() for sample in samples])
    by_engine = np.concatenate([sample.rollout_logprobs for sample in samples])
    differences = np.abs(np.concatenate(by_trainer).astype(np.float64) - by_engine)
    largest = float(differences.max())  # NaN if one of them is
    tolerance = cfg.rollout.logprob_tolerance
    if tolerance is None:
        tolerance = TOLERANCE[cfg.actor.megatron.dtype]
    if not largest <= tolerance:  # NaN fails too
        raise WeightSyncError(
            f"engine and trainer differ by {largest:.3g} in the log-probability of a token right "
            f"after a weight sync, more than {tolerance:g} (rollout.logprob_tolerance). "
            f"{_next_step(cfg)}",
            role="controller",
            step=step,
        )
    logger.info("engine and trainer agree: log-probabilities differ by at most %.2g", largest)
    return largest


def _next_step(cfg: RunConfig) -> str:
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size).name
    option = f" --layout {layout}" if layout else ""
    command = f"mcore-rl verify model --model {shlex.quote(cfg.model.folder)}{option}"
    return f"Which of the two departs from transformers, and in which layer: {command}"
