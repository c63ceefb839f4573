"""Random minibatches for the tests of this folder, and the objective of a part of one."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mcore_rl.algorithms.losses import POLICY_LOSSES, PolicyLossInputs, resolve_clip
from mcore_rl.algorithms.objective import ActorObjective, ObjectiveConfig, actor_objective
from mcore_rl.algorithms.segments import Segments
from mcore_rl.types import Denominators


@dataclass(frozen=True, kw_only=True)
class TensorSequence:
    """One sequence; all tensors [n] float64, mask bool."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    rollout_is_weights: Tensor
    mask: Tensor


def random_sequences(seed, lengths=(5, 1, 9, 3, 7, 2, 4, 6)):
    """Return sequences with about a third of the tokens untrained; the last trains nothing."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
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
                rollout_is_weights=(0.3 * draw()).exp(),
                mask=mask if i < len(lengths) - 1 else torch.zeros(n, dtype=torch.bool),
            )
        )
    return sequences


def count(sequences):
    """Return the denominators of the minibatch that the sequences make."""
    trained = [int(s.mask.sum()) for s in sequences]
    return Denominators(num_tokens=sum(trained), num_sequences=sum(n > 0 for n in trained))


def packed(sequences):
    """Return (inputs, entropy_T, ref_logprobs_T) of the sequences packed into one row."""

    def row(name):
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
        rollout_is_weights_T=row("rollout_is_weights"),
        segments=segments,
    )
    return inputs, row("entropy"), row("ref_logprobs")


def objective_spec(loss_mode, agg_mode, **options):
    """Return a spec with the loss's default clip and options."""
    loss = POLICY_LOSSES.get(loss_mode)
    return ActorObjective(
        policy_loss=loss,
        clip=resolve_clip(loss_mode, None, None, None, None),
        agg_mode=agg_mode,
        loss_options={name: getattr(ObjectiveConfig(), name) for name in loss.reads},
        loss_scale_factor=17.0 if agg_mode == "seq-mean-token-sum-norm" else None,
        **options,
    )


def objective_of(part, denominators, spec):
    """Return (objective, metrics) of some sequences of a minibatch as one micro-batch."""
    inputs, entropy_T, ref_logprobs_T = packed(part)
    return actor_objective(
        inputs,
        entropy_T=entropy_T,
        ref_logprobs_T=ref_logprobs_T,
        denominators=denominators,
        spec=spec,
    )
