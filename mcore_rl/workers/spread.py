"""Sends a share from the first of the ranks that work on it to the others.

The controller sends each share once. Within the ranks of one data-parallel rank (tensor, context
and pipeline parallel together) it is sent over their own network, in two broadcasts.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from mcore_rl.frames import decode, encode
from mcore_rl.types import Share

_ALIGNMENT = 64
"""Bytes; arrays that lie in the received buffer are aligned."""


def spread(share: Share | None, group: ProcessGroup) -> Share:
    """Return the share that the group's first rank received; collective.

    Args:
        share: on the first rank; None on the others.
        group: gloo.
    """
    is_first = group.rank() == 0
    assert is_first == (share is not None), "the first rank of a share is given it, no other"
    if group.size() == 1:
        assert share is not None
        return share
    source = dist.get_global_rank(group, 0)
    parts = [np.frombuffer(frame, np.uint8) for frame in encode(share)] if is_first else []
    counts = torch.tensor([len(parts)])
    dist.broadcast(counts, src=source, group=group)
    sizes = torch.tensor([part.size for part in parts] or [0] * int(counts))
    dist.broadcast(sizes, src=source, group=group)
    padded = [size + -size % _ALIGNMENT for size in sizes.tolist()]
    joined = torch.empty(sum(padded), dtype=torch.uint8)
    rows = joined.split(padded)
    for part, row in zip(parts, rows, strict=is_first):
        row.numpy()[: part.size] = part
    dist.broadcast(joined, src=source, group=group)
    if share is not None:
        return share
    frames = [row[:size].numpy().data for row, size in zip(rows, sizes.tolist(), strict=True)]
    return decode(frames)
