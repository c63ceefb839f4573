"""What every policy loss must hold, as a check that the tests of one call; here and in plug-ins.

    from mcore_rl.algorithms.losses.check import check_loss

    def test_my_loss_is_the_same_for_every_cut():
        check_loss("my_loss", MyLossConfig(strength=0.5))

A minibatch has one objective and one gradient, whatever micro-batches it is cut into; what stands
on untrained tokens changes nothing; a micro-batch without trained tokens gives 0, connected to the
graph. A loss that averages, or looks at its neighbours in the row, breaks one of them.

Float64 on the CPU, over random minibatches; on other ranks nothing else is computed. It does not
tell whether the formula is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from mcore_rl.algorithms.aggregate import AGG_MODES, SCALED_AGG_MODE
from mcore_rl.algorithms.losses.base import POLICY_LOSSES, PolicyLossInputs
from mcore_rl.algorithms.objective import ActorObjective, actor_objective
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import Metrics, merge, to_floats
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TensorSequence:
    """One sequence; all tensors [n] float64, mask bool."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    rollout_weights: Tensor
    mask: Tensor


def check_loss(name: str, options: Any = None, *, num_minibatches: int = 4) -> None:
    """Raise an AssertionError that says what differs unless the registered loss holds all three.

    Args:
        name: of the loss, `actor.policy_loss.loss_mode`.
        options: of the loss; None: their defaults.
        num_minibatches: random minibatches for each aggregation.
    """
    own = POLICY_LOSSES.get(name).agg_mode
    for agg_mode in AGG_MODES if own is None else (own,):
        spec = objective_spec(name, agg_mode, options)
        for seed in range(num_minibatches):
            sequences = random_sequences(seed)
            for num_parts in (2, 4, 8, 11):  # 11 leaves empty micro-batches
                check_cut(sequences, [sequences[i::num_parts] for i in range(num_parts)], spec)
            check_untrained_tokens(sequences, spec)
            check_empty_micro_batches(sequences, spec)


def check_cut(
    sequences: Sequence[TensorSequence],
    parts: Sequence[Sequence[TensorSequence]],
    spec: ActorObjective,
) -> None:
    """Raise an AssertionError unless the parts of a minibatch add up to it in value, gradient and
    metrics."""
    denominators = count(sequences)
    whole, whole_metrics = objective_of(sequences, denominators, spec)
    results = [objective_of(part, denominators, spec) for part in parts]
    total = torch.stack([objective for objective, _ in results]).sum()
    where = f"in {len(parts)} micro-batches ({spec.agg_mode})"
    # float64, some dozens of tokens of order 1: the order of additions differs.
    assert torch.allclose(total, whole, rtol=1e-12, atol=1e-13), (
        f"the loss is {total.item()} {where}, {whole.item()} in one"
    )
    for found, wanted in zip(gradients(total, sequences), gradients(whole, sequences), strict=True):
        difference = float((found - wanted).abs().max())
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14), (
            f"the gradient differs by {difference} {where}"
        )
    found, wanted = to_floats(merge(m for _, m in results)), to_floats(whole_metrics)
    assert found.keys() == wanted.keys(), f"the metrics are {sorted(found)} {where}"
    for key, value in found.items():  # masked metrics are float32
        assert math.isclose(value, wanted[key], rel_tol=1e-5, abs_tol=1e-6), (
            f"{key} is {value} {where}, {wanted[key]} in one"
        )


def check_untrained_tokens(sequences: Sequence[TensorSequence], spec: ActorObjective) -> None:
    """Raise an AssertionError unless NaN and infinities on untrained tokens change nothing."""

    def spoilt(x: Tensor, mask: Tensor, value: float) -> Tensor:
        return torch.where(mask, x.detach(), value).requires_grad_(x.requires_grad)

    dirty = [
        replace(
            s,
            logprobs=spoilt(s.logprobs, s.mask, -math.inf),
            old_logprobs=spoilt(s.old_logprobs, s.mask, math.nan),
            ref_logprobs=spoilt(s.ref_logprobs, s.mask, math.nan),
            entropy=spoilt(s.entropy, s.mask, math.nan),
            advantages=spoilt(s.advantages, s.mask, math.inf),
            rollout_weights=spoilt(s.rollout_weights, s.mask, math.nan),
        )
        for s in sequences
    ]
    denominators = count(sequences)
    objective, metrics = objective_of(sequences, denominators, spec)
    found, found_metrics = objective_of(dirty, denominators, spec)
    assert torch.equal(found, objective), f"untrained tokens make {found.item()} of the loss"
    assert to_floats(found_metrics) == to_floats(metrics), "untrained tokens change a metric"
    for s, actual, wanted in zip(
        [s for s in sequences for _ in range(2)],
        gradients(found, dirty),
        gradients(objective, sequences),
        strict=True,
    ):
        assert torch.equal(actual, wanted), "untrained tokens change the gradient"
        assert not wanted[~s.mask].any(), "an untrained token has a gradient"


def check_empty_micro_batches(sequences: Sequence[TensorSequence], spec: ActorObjective) -> None:
    """Raise an AssertionError unless a part that trains nothing gives 0, with a gradient of 0."""
    untrained = [s for s in sequences if not s.mask.any()]
    for part in ([], untrained):
        leaf_T = packed(part)[0].logprobs_T.detach().requires_grad_()
        objective, _ = objective_of(part, count(sequences), spec, logprobs_T=leaf_T)
        assert objective.item() == 0, f"a micro-batch that trains nothing has loss {objective}"
        assert objective.requires_grad, "the loss of an empty micro-batch is not in the graph"
        (gradient_T,) = torch.autograd.grad(objective, leaf_T)
        assert not gradient_T.any(), "a micro-batch that trains nothing has a gradient"


def random_sequences(
    seed: int, lengths: Sequence[int] = (5, 1, 9, 3, 7, 2, 4, 6)
) -> list[TensorSequence]:
    """Return sequences with about a third of the tokens untrained; the last trains nothing."""
    generator = torch.Generator().manual_seed(seed)
    sequences: list[TensorSequence] = []
    for i, n in enumerate(lengths):
        draw = partial(torch.randn, n, generator=generator, dtype=torch.float64)
        mask = torch.rand(n, generator=generator) < 0.7
        mask[0] = True
        old = -draw().abs()
        sequences.append(
            TensorSequence(
                logprobs=(old + 0.5 * draw()).requires_grad_(),
                old_logprobs=old,
                ref_logprobs=old + 0.3 * draw(),
                entropy=draw().abs().requires_grad_(),
                advantages=draw()[:1].expand(n),
                rollout_weights=(0.3 * draw()).exp(),
                mask=mask if i < len(lengths) - 1 else torch.zeros(n, dtype=torch.bool),
            )
        )
    return sequences


def count(sequences: Sequence[TensorSequence]) -> Denominators:
    """Return the denominators of the minibatch that the sequences make."""
    trained = [int(s.mask.sum()) for s in sequences]
    return Denominators(num_tokens=sum(trained), num_sequences=sum(n > 0 for n in trained))


def packed(sequences: Sequence[TensorSequence]) -> tuple[PolicyLossInputs, dict[str, Tensor]]:
    """Return the sequences packed into one row: what the loss sees, and what the objective does."""

    def row(name: str) -> Tensor:
        empty = torch.zeros(0, dtype=torch.float64)
        return torch.cat([empty, *(getattr(s, name) for s in sequences)])

    masks = [s.mask for s in sequences]
    lengths = torch.tensor([len(mask) for mask in masks], dtype=torch.int64)
    segments = Segments(
        sequence_T=torch.arange(len(masks)).repeat_interleave(lengths),
        mask_T=torch.cat([torch.zeros(0, dtype=torch.bool), *masks]),
        num_tokens_S=torch.tensor([float(mask.sum()) for mask in masks], dtype=torch.float64),
    )
    inputs = PolicyLossInputs(
        logprobs_T=row("logprobs"),
        old_logprobs_T=row("old_logprobs"),
        advantages_T=row("advantages"),
        segments=segments,
    )
    beside = {
        "entropy_T": row("entropy"),
        "ref_logprobs_T": row("ref_logprobs"),
        "rollout_weights_T": row("rollout_weights"),
    }
    return inputs, beside


def objective_spec(name: str, agg_mode: str, options: Any = None, **terms: Any) -> ActorObjective:
    """Return a spec with this loss and aggregation.

    Args:
        name: of the loss.
        agg_mode: one of `AGG_MODES`.
        options: of the loss; None: their defaults.
        terms: other fields of the spec.
    """
    loss = POLICY_LOSSES.get(name)
    return ActorObjective(
        policy_loss=loss,
        options=loss.config() if options is None else options,
        agg_mode=agg_mode,
        loss_scale_factor=17.0 if agg_mode == SCALED_AGG_MODE else None,
        **terms,
    )


def objective_of(
    part: Sequence[TensorSequence],
    denominators: Denominators,
    spec: ActorObjective,
    logprobs_T: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Return (objective, metrics) of some sequences of a minibatch as one micro-batch."""
    inputs, beside = packed(part)
    if logprobs_T is not None:
        inputs = replace(inputs, logprobs_T=logprobs_T)
    return actor_objective(inputs, **beside, denominators=denominators, spec=spec)


def gradients(objective: Tensor, sequences: Sequence[TensorSequence]) -> list[Tensor]:
    """Return the gradients in the logprobs and the entropy of each sequence."""
    leaves = [leaf for s in sequences for leaf in (s.logprobs, s.entropy)]
    found = cast(
        "Sequence[Tensor | None]",  # which torch leaves out of its type
        torch.autograd.grad(objective, leaves, allow_unused=True, retain_graph=True),
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
