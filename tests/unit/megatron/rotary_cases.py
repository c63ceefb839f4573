"""What test_megatron_rotary.py runs in processes with Megatron's CPU support."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

BOUNDARIES = (0, 8, 12, 32, 36)


def counted(method, calls):
    """Return the method of a tensor, which adds its calls to a list."""

    def call(tensor):
        calls.append(tensor.shape)
        return method(tensor)

    return call


def turned_both_ways(dtype, num_turned, mscale):
    """Return (output, gradient) of the queries of a row by this package's function and by
    Megatron's own, and how often each read the boundaries for two calls."""
    from megatron.core.models.common.embeddings import apply_rotary_pos_emb

    from mcore_rl.megatron.rotary import packed_rotary

    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(1)
    length = BOUNDARIES[-1] // group.size()
    config: Any = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )
    freqs = torch.rand(20, 1, 1, num_turned // 2, generator=generator).repeat(1, 1, 1, 2) * 50
    values = torch.randn(length, 3, 16, generator=generator).to(dtype)
    weights = torch.randn(length, 3, 16, generator=generator).to(dtype)
    found = []
    for function in (packed_rotary, apply_rotary_pos_emb):
        boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32)
        t = values.clone().requires_grad_()
        reads = []
        with mock.patch.object(torch.Tensor, "tolist", counted(torch.Tensor.tolist, reads)):
            function(t, freqs, config, boundaries, mscale, group)
            output = function(t, freqs, config, boundaries, mscale, group)
        output.backward(weights)
        found.append((output.detach(), t.grad, len(reads)))
    return found


def other_angles():
    """Return whether a row takes other angles and another type after it had some."""
    from mcore_rl.megatron.rotary import packed_rotary

    group = dist.group.WORLD
    assert group is not None
    config: Any = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32)
    one, other = torch.rand(20, 1, 1, 16), torch.rand(20, 1, 1, 16)
    t = torch.randn(BOUNDARIES[-1], 3, 16)

    def turned(values, freqs, row, mscale=1.0):
        return packed_rotary(values, freqs, config, row, mscale, group)

    first = turned(t, one, boundaries)
    changed = [
        turned(t, other, boundaries),
        turned(t, one, boundaries, 1.5),
        turned(t.double(), one, boundaries),
    ]
    alone = [
        turned(t, other, boundaries.clone()),
        turned(t, one, boundaries.clone(), 1.5),
        turned(t.double(), one, boundaries.clone()),
    ]
    assert not torch.equal(first, changed[0])
    return [torch.equal(a, b) for a, b in zip(changed, alone, strict=True)]
