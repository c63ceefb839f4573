"""A step on the controller before there was a message channel, for `controller.py --against`.

Tokens were Python objects, and every rank of a model got a pickle of its share. Nothing is sent
here: that went through torch's store and gloo, and its time is left out.
"""

from __future__ import annotations

import gc
import pickle
from types import SimpleNamespace
from typing import Any

from controller import (
    DP,
    GROUP_SIZE,
    MAX_TOKENS,
    MODEL_RANKS,
    NUM_MINIBATCHES,
    SAMPLING,
    Ledger,
    make_prompts,
    make_responses,
    make_rewards,
)

from mcore_rl.algorithms.advantages import AlgorithmConfig, assign_advantages
from mcore_rl.data.packing import TokenBudget, packing_metrics, plan_minibatch, split_minibatches
from mcore_rl.loop.generate import generate_groups, rollout_metrics
from mcore_rl.rollout.base import GenerationResult
from mcore_rl.types import Prompt, with_sample_fields


def run(num_tokens: int) -> dict[str, Any]:
    """Do one step and return what it took."""
    cut = TokenBudget(max_tokens=MAX_TOKENS)
    lists = [ids.tolist() for ids in make_prompts(num_tokens)]
    prompts = [
        Prompt(uid=f"p:{i}", token_ids=ids, text="", data_source="s", ground_truth="")
        for i, ids in enumerate(lists)
    ]
    results = [
        GenerationResult(
            token_ids=ids.tolist(),
            logprobs=logprobs.tolist(),
            finish_reason="stop",
            weight_version=0,
        )
        for ids, logprobs in make_responses(num_tokens)
    ]
    cluster: Any = SimpleNamespace(generate=lambda requests: results)
    tokenizer: Any = SimpleNamespace(decode=lambda *_, **__: "")  # decoding is not measured
    gc.collect()
    gc.freeze()
    ledger = Ledger()
    with ledger.stage("samples"):
        groups = generate_groups(cluster, prompts, GROUP_SIZE, tokenizer=tokenizer, **SAMPLING)
    results.clear()
    samples = [sample for group in groups for sample in group.samples]
    tokens = sum(len(sample.token_ids) for sample in samples)
    groups = with_sample_fields(groups, reward=make_rewards(len(samples)))
    # What comes back of the passes: unpickled lists.
    numbers = [sample.rollout_logprobs for sample in samples]
    del samples
    ledger.begin_memory()
    wire = {"logprobs": 0, "updates": 0}
    with ledger.stage("metrics"):
        rollout_metrics(groups, 0)
    for name in ("old_logprobs", "ref_logprobs"):
        with ledger.stage("logprobs"):
            sequences = [sample.to_sequence() for group in groups for sample in group.samples]
            wire["logprobs"] += _sent(plan_minibatch(sequences, DP, cut).micro_batches)
            groups = with_sample_fields(groups, **{name: numbers})
    with ledger.stage("advantages"):
        groups, _ = assign_advantages(groups, AlgorithmConfig())
    with ledger.stage("updates"):
        for minibatch in split_minibatches(groups, len(groups) // NUM_MINIBATCHES):
            sequences = [sample.to_sequence() for group in minibatch for sample in group.samples]
            plan = plan_minibatch(sequences, DP, cut)
            packing_metrics(plan, cut)
            wire["updates"] += _sent(plan.micro_batches)
    return ledger.figures(tokens) | {
        "wire": {"logprobs": wire["logprobs"] / 2 / tokens, "updates": wire["updates"] / tokens}
    }


def _sent(micro_batches: Any) -> int:
    """Pickle what every rank of every model was sent; return its bytes."""
    return sum(
        len(pickle.dumps(of_rank, protocol=5))
        for of_rank in micro_batches
        for _ in range(MODEL_RANKS)
    )
