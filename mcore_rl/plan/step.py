"""One step as it would be packed: the run's own prompts, answered by the fake engine.

The fake engine draws a length for every response, evenly up to `data.max_response_length`; a model
that is trained answers otherwise, so micro-batches are an estimate where they are cut by tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mcore_rl.config.run import RunConfig
from mcore_rl.data.chat import load_tokenizer
from mcore_rl.data.packing import packing_metrics, plan_micro_batches
from mcore_rl.data.prompts import ItemStream, load_prompts
from mcore_rl.data.rows import read_rows
from mcore_rl.metrics import Metrics, merge
from mcore_rl.model_files import has_tokenizer
from mcore_rl.rollout.base import GenerationRequest, SamplingParams
from mcore_rl.rollout.fake_engine import response_length
from mcore_rl.types import Denominators, Layout, MinibatchPlan

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4
"""Of English text; used where there is no tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The first step of a run."""

    prompt_tokens: Sequence[int]
    """Of each prompt of the step."""
    response_tokens: Sequence[int]
    """Of each sample, prompt by prompt."""
    micro_batches: Sequence[int]
    """Micro-batches per rank of each minibatch."""
    largest_micro_batch: int
    """Tokens of the largest one."""
    metrics: Metrics
    """`batch/*` of the step, as the run would log them."""


def plan_step(cfg: RunConfig, layout: Layout, prompt_tokens: Sequence[int]) -> StepPlan:
    """Return the first step of the run, of one pass over its minibatches.

    Args:
        cfg: the run.
        layout: of the trainer.
        prompt_tokens: of every prompt of `data.train_files`.

    Raises:
        UserError: for data that the run would refuse.
    """
    prompts, responses = step_lengths(cfg, prompt_tokens)
    n, size = cfg.rollout.n, cfg.actor.ppo_mini_batch_size
    plans = [
        _minibatch(cfg, layout, prompts[start : start + size], responses[start * n :])
        for start in range(0, len(prompts), size)
    ]
    return StepPlan(
        prompt_tokens=prompts,
        response_tokens=responses,
        micro_batches=[len(plan.micro_batches[0]) for plan in plans],
        largest_micro_batch=max(
            sum(plan.lengths[index] for index in micro_batch)
            for plan in plans
            for rank in plan.micro_batches
            for micro_batch in rank
        ),
        metrics=merge(packing_metrics(plan, cfg.actor.cut) for plan in plans),
    )


def step_lengths(cfg: RunConfig, prompt_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the tokens of each prompt of the first step, and of each response, prompt by prompt.

    Raises:
        UserError: if there are fewer prompts than a step has.
    """
    stream = ItemStream(prompt_tokens, seed=cfg.data.seed, shuffle=cfg.data.shuffle)
    prompts = stream.next(cfg.data.train_batch_size)
    responses = [
        response_length(_request(cfg, length, number, index))
        for number, length in enumerate(prompts)
        for index in range(cfg.rollout.n)
    ]
    return prompts, responses


def prompt_lengths(cfg: RunConfig) -> list[int]:
    """Return the tokens of every prompt of `data.train_files`, estimated without a tokenizer."""
    if has_tokenizer(cfg.model.folder):
        tokenizer = load_tokenizer(cfg.model.folder)
        prompts = load_prompts(cfg.data.train_files, cfg.data, tokenizer)
        return [len(prompt.token_ids) for prompt in prompts]
    logger.warning(
        "%s has no tokenizer: prompts are counted as %d characters per token",
        cfg.model.path,
        CHARACTERS_PER_TOKEN,
    )
    rows = read_rows(cfg.data.train_files)
    lengths = [_num_characters(row.get(cfg.data.prompt_key)) for row in rows]
    limit = cfg.data.max_prompt_length
    return [min(limit, max(1, length // CHARACTERS_PER_TOKEN)) for length in lengths]


def _num_characters(prompt: object) -> int:
    if isinstance(prompt, list):
        return sum(len(str(message.get("content", ""))) for message in prompt)
    return len(str(prompt))


def _request(cfg: RunConfig, length: int, number: int, index: int) -> GenerationRequest:
    sampling = SamplingParams(
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        max_tokens=cfg.data.max_response_length,
        seed=number * cfg.rollout.n + index,
    )
    return GenerationRequest(prompt_token_ids=np.array([length], np.int32), sampling=sampling)


def _minibatch(
    cfg: RunConfig, layout: Layout, prompts: Sequence[int], responses: Sequence[int]
) -> MinibatchPlan:
    """Return the micro-batches of the samples of `prompts`, the first of `responses`."""
    n = cfg.rollout.n
    pairs = [(length, responses[i * n + j]) for i, length in enumerate(prompts) for j in range(n)]
    lengths = [p + r for p, r in pairs]
    multiple_of = layout.micro_batch_multiple
    return MinibatchPlan(
        lengths=lengths,
        micro_batches=plan_micro_batches(
            lengths, layout.dp, cfg.actor.cut, multiple_of=multiple_of
        ),
        denominators=Denominators(num_tokens=sum(r for _, r in pairs), num_sequences=len(pairs)),
    )
