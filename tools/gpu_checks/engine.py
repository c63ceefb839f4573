"""An engine beside a trainer, in one process and on one device: weights, sleep, routes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from gpu_checks.models import gmpo, save_random_model, sequences_of
from gpu_checks.outcome import Bound, Outcome, Values, bounded, free_bytes, now
from gpu_checks.sizes import Sizes
from gpu_checks.worker import running
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.phases import Phase
from mcore_rl.rollout.base import GenerationRequest, GenerationResult, SamplingParams
from mcore_rl.tolerances import AFTER_SYNC, SHARES
from mcore_rl.types import TokenSequence

_SAME = "same weights, prompt and seed draw the same tokens"
_AS_A_RUN = "what a run starts with (mcore_rl/tolerances.py)"


def sync_moe(sizes: Sizes, device: torch.device) -> Outcome:
    """Weights and routes of a mixture of experts: see `synced`, and the share of experts that the
    engine says it chose and the trainer's routers do not for the same tokens."""
    outcome = synced(sizes.engine_moe, sizes, device)
    reason = "in bfloat16 two experts are near a tie for a token here and there, in float32 hardly"
    most = 0.05 if sizes.engine_dtype == "bfloat16" else 0.005
    bound = Bound("other_experts", outcome.values["other_experts"], most, reason)
    return Outcome(outcome.values, [*outcome.bounds, bound])


def sync_dense(sizes: Sizes, device: torch.device) -> Outcome:
    """Weights of a dense model: see `synced`."""
    return synced(sizes.engine_dense, sizes, device)


def synced(config: PreTrainedConfig, sizes: Sizes, device: torch.device) -> Outcome:
    """Engine and trainer agree after a sync; with weights A, B and A again the engine draws the
    first tokens again; it leaves the current device as it was."""
    values: Values = {}
    with beside(config, sizes, device) as (cluster, worker):
        is_other = device.type == "cuda" and torch.cuda.current_device() != device.index
        values["other_current_device"] = int(is_other)
        params = worker.actor.params
        weights = {name: param.detach().clone() for name, param in params.items()}
        start = now(device)
        cluster.engines.sync_weights(0)
        values["sync_s"] = now(device) - start
        first = drawn(cluster, sizes, config)
        values["logprob_difference_of_a"] = float(differences(cluster, first).mean())
        if hasattr(config, "num_experts"):
            values["other_experts"] = other_experts(cluster, worker, sizes, config)
        with torch.no_grad():
            for param in params.values():
                param.mul_(1.25)
        cluster.engines.sync_weights(1)
        second = drawn(cluster, sizes, config)
        values["logprob_difference_of_b"] = float(differences(cluster, second).mean())
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(weights[name])
        cluster.engines.sync_weights(2)
        third = drawn(cluster, sizes, config)
    values["tokens_of_b_as_of_a"] = same_share(first, second)
    values["tokens_not_drawn_again"] = 1 - same_share(first, third)
    apart = {name: values[name] for name in ("logprob_difference_of_a", "logprob_difference_of_b")}
    lost = "the trainer's next tensors would lie on another device"
    return Outcome(
        values,
        [
            *bounded(apart, AFTER_SYNC[sizes.engine_dtype] * SHARES["the mean"], _AS_A_RUN),
            Bound("tokens_of_b_as_of_a", values["tokens_of_b_as_of_a"], 0.9, "B is another model"),
            Bound("tokens_not_drawn_again", values["tokens_not_drawn_again"], 0, _SAME),
            Bound("other_current_device", values["other_current_device"], 0, lost),
        ],
    )


def other_experts(cluster: Cluster, worker: Any, sizes: Sizes, config: PreTrainedConfig) -> float:
    """Return the share of the engine's experts that the trainer's routers do not choose."""
    drawn_with = sequences_drawn(drawn(cluster, sizes, config, keep_routes=True))
    recorded = cluster.trainer.record_logprobs([sequence for sequence, _ in drawn_with])
    held, other, total = worker.actor.routes, 0, 0
    for (_, result), (_, at) in zip(drawn_with, recorded, strict=True):
        at_engine: Any = result.routed_experts
        by_engine = np.sort(held.get(at_engine.rank, at_engine.key), axis=-1)
        by_trainer = np.sort(held.get(at.rank, at.key), axis=-1)
        other += int((by_engine != by_trainer).sum())
        total += by_trainer.size
    return other / total


def sleep(sizes: Sizes, device: torch.device) -> Outcome:
    """The engine sleeps while the trainer works, both by turns on the whole device: what is freed,
    and that the engine draws with the trainer's weights when it has been woken."""
    values: Values = {}
    config = sizes.engine_dense
    with beside(config, sizes, device, sleep_level=2) as (cluster, worker):
        cluster.engines.sync_weights(0)
        first = drawn(cluster, sizes, config)
        weights = sum(param.nbytes for param in worker.actor.params.values())
        awake = free_bytes(device)
        cluster.phases.enter(Phase.LOGPROBS)  # the actor's weights come back
        values["freed_gib"] = (free_bytes(device) - awake) / 2**30
        start = now(device)
        cluster.engines.sync_weights(1)
        values["wake_and_sync_s"] = now(device) - start
        again = drawn(cluster, sizes, config)
        cluster.trainer.begin_step()
        sequences = sequences_of(sizes.prompt_lengths, config.vocab_size)
        cluster.trainer.update(sequences, gmpo())
        cluster.engines.sync_weights(2)
        trained = drawn(cluster, sizes, config)
        apart = differences(cluster, trained)
    values["tokens_not_drawn_again"] = 1 - same_share(first, again)
    values["mean_logprob_difference"] = float(apart.mean())
    bounds = [
        Bound("tokens_not_drawn_again", values["tokens_not_drawn_again"], 0, _SAME),
        Bound(
            "mean_logprob_difference",
            values["mean_logprob_difference"],
            AFTER_SYNC[sizes.engine_dtype] * SHARES["the mean"],
            _AS_A_RUN,
        ),
    ]
    if device.type == "cuda":
        # The engine's weights and cache leave, as many weights of the trainer come.
        kept = weights / 2**30 - values["freed_gib"]
        reason = "an engine that sleeps gives up its cache, which is larger than the weights"
        bounds.append(Bound("weights_less_freed_gib", kept, 0, reason))
    return Outcome(values, bounds)


# ------------------------------------------------------------------ what they are made of


@contextlib.contextmanager
def beside(
    config: PreTrainedConfig, sizes: Sizes, device: torch.device, **rollout: Any
) -> Iterator[tuple[Cluster, Any]]:
    """Yield the loop's view of a trainer with an engine beside it, and the worker."""
    with tempfile.TemporaryDirectory() as root:
        save_random_model(config, Path(root), device)
        settings = sizes.engine | rollout
        with running(Path(root), device, 2, engine=settings, dtype=sizes.engine_dtype) as (
            cluster,
            worker,
        ):
            yield cluster, worker


def drawn(
    cluster: Cluster, sizes: Sizes, config: PreTrainedConfig, *, keep_routes: bool = False
) -> list[tuple[GenerationRequest, GenerationResult]]:
    """Return requests and what the engine draws for them, the same requests each time."""
    vocab_size: Any = config.vocab_size
    requests = [
        GenerationRequest(
            prompt_token_ids=prompt.token_ids,
            sampling=SamplingParams(
                temperature=1.0,
                top_p=1.0,
                top_k=-1,
                max_tokens=sizes.response_length,
                seed=number,
            ),
        )
        for number, prompt in enumerate(sequences_of(sizes.prompt_lengths, vocab_size))
    ]
    groups = cluster.engines.generate([[one] for one in requests], keep_routes=keep_routes)
    return list(zip(requests, (result for (result,) in groups), strict=True))


def sequences_drawn(
    results: list[tuple[GenerationRequest, GenerationResult]],
) -> list[tuple[TokenSequence, GenerationResult]]:
    """Return the whole sequences, of which what was drawn trains, and the results."""
    return [
        (
            TokenSequence(
                token_ids=np.concatenate([request.prompt_token_ids, result.token_ids]),
                loss_mask=np.arange(len(request.prompt_token_ids) + len(result.token_ids))
                >= len(request.prompt_token_ids),
            ),
            result,
        )
        for request, result in results
    ]


def differences(
    cluster: Cluster, results: list[tuple[GenerationRequest, GenerationResult]]
) -> np.ndarray:
    """Return how far the trainer's log-probabilities of what was drawn are from the engine's."""
    sequences = sequences_drawn(results)
    by_trainer = cluster.trainer.logprobs([sequence for sequence, _ in sequences])
    return np.concatenate(
        [
            np.abs(np.asarray(numbers)[-len(result.token_ids) :] - result.logprobs)
            for numbers, (_, result) in zip(by_trainer, sequences, strict=True)
        ]
    )


def same_share(
    one: list[tuple[GenerationRequest, GenerationResult]],
    other: list[tuple[GenerationRequest, GenerationResult]],
) -> float:
    """Return the share of tokens that are the same in both."""
    pairs = zip(one, other, strict=True)
    return float(np.mean(np.concatenate([a.token_ids == b.token_ids for (_, a), (_, b) in pairs])))
