"""Objects to frames of bytes and back: pickle protocol 5, with arrays beside the pickle.

    [pickle, sizes, small buffers joined, large buffer, large buffer, ...]

Arrays are neither copied nor boxed on the way, except small ones, which are joined in one frame
(each begins at a multiple of 64 bytes, so that arrays over it are aligned). A value without arrays
is only the pickle.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

Frame = bytes | memoryview

_LARGE = 1 << 16
"""Bytes from which a buffer has a frame of its own."""
_ALIGNMENT = 64


def encode(value: Any) -> list[Frame]:
    """Return the frames of a value."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    if not buffers:
        return [body]
    views = [buffer.raw() for buffer in buffers]
    small = bytearray()
    for view in views:
        if view.nbytes < _LARGE:
            small += view
            small += bytes(-len(small) % _ALIGNMENT)
    sizes = np.array([view.nbytes for view in views], dtype=np.int64).tobytes()
    return [body, sizes, bytes(small), *(view for view in views if view.nbytes >= _LARGE)]


def decode(frames: Sequence[Frame]) -> Any:
    """Return the value of frames that `encode` made; its arrays use the memory of the frames.

    This unpickles: the receiver must make sure that the frames come from a process of the run.
    """
    if len(frames) == 1:
        return pickle.loads(frames[0])
    body, sizes, joined, *large = frames
    # Copied to where it is aligned: a received frame may begin anywhere.
    small, rest, begin = np.array(np.frombuffer(joined, np.uint8)).data, iter(large), 0
    buffers: list[Frame] = []
    for size in np.frombuffer(sizes, dtype=np.int64).tolist():
        if size < _LARGE:
            buffers.append(small[begin : begin + size])
            begin += size + -size % _ALIGNMENT
        else:
            buffers.append(next(rest))
    return pickle.loads(body, buffers=buffers)


def num_bytes(frames: Sequence[Frame]) -> int:
    """Return the size of all frames together."""
    return sum(frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames)
