"""The attention kernel of the local layers against the plain one."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from gpu_checks.outcome import Outcome, relative_error, within
from gpu_checks.sizes import Sizes


def attention(sizes: Sizes, device: torch.device) -> Outcome:
    """Errors of values and gradients in bfloat16 against the plain kernel in float32.

    Whole rows, and one rank's part of a row under context parallelism, where queries and keys
    differ in number and the kernel must align the last ones.
    """
    from mcore_rl.megatron.attention import (
        causal_spans,
        packed_causal_attention,
        packed_flash_attention,
    )

    attend = packed_flash_attention if device.type == "cuda" else packed_causal_attention
    total = sum(sizes.attention_lengths)
    boundaries = [0, *itertools.accumulate(sizes.attention_lengths)]
    errors: dict[str, float] = {}
    for name, (rank, size) in {"whole": (0, 1), "cp2_rank0": (0, 2), "cp2_rank1": (1, 2)}.items():
        torch.manual_seed(2)
        spans = causal_spans(boundaries, rank, size)
        shapes = ((total // size, 16, 64), (total, 8, 64), (total, 8, 64))
        inputs = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
        outward = torch.randn(shapes[0], device=device)
        found, expected = (
            _with_gradients(function, [x.to(dtype) for x in inputs], spans, outward)
            for function, dtype in (
                (attend, torch.bfloat16),
                (packed_causal_attention, torch.float32),
            )
        )
        for part, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            errors[f"{name}/{part}"] = relative_error(ours, theirs)
    return within(errors, 0.02, "bfloat16 keeps 8 bits, 0.4 percent; 0.4 percent seen on CPU")


def _with_gradients(function: Any, inputs: Any, spans: Any, outward: torch.Tensor) -> list[Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, spans, 0.125)
    out.backward(outward.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]
