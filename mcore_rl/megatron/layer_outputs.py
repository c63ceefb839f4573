"""What comes out of the embedding, of each decoder layer and of the final norm, recorded in a pass.

Outputs go by the names that these modules have in Hugging Face's models (`model.layers.3`), so that
the two can be laid side by side. Parts of a row that sequence and context parallelism spread over
ranks are put together as they are recorded; stages record their own layers, and the controller puts
those together. Everything recorded stays in memory until it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from mcore_rl.data.batch import PackedBatch
from mcore_rl.megatron.context_parallel import gather_positions
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.types import MicroBatch


class LayerRecording:
    """A `Routes` to run one pass with, then what came out of the layers.

    Args:
        chunks: this rank's model chunks, not wrapped.
        parallel: process groups.
    """

    def __init__(self, chunks: Sequence[Any], parallel: Parallel) -> None:
        self._parallel = parallel
        self._sequence_parallel = chunks[0].config.sequence_parallel
        self._of_chunk: dict[Any, list[dict[str, list[np.ndarray]]]] = {c: [] for c in chunks}
        """By chunk and micro-batch: module name -> output of each sequence."""

    @contextlib.contextmanager
    def __call__(self, chunk: Any, batch: PackedBatch) -> Iterator[None]:
        outputs: dict[str, list[np.ndarray]] = {}

        def record(name: str, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs[name] = self._cut(hidden, batch)

        with contextlib.ExitStack() as hooks:
            for name, module in _modules(chunk):
                hook = module.register_forward_hook(
                    lambda module, inputs, output, name=name: record(name, output)
                )
                hooks.callback(hook.remove)
            yield
        self._of_chunk[chunk].append(outputs)

    def by_index(self, micro_batches: Sequence[MicroBatch]) -> dict[int, Mapping[str, np.ndarray]]:
        """Return the outputs of this rank's modules for each sequence of the pass.

        Returns:
            By planned index, then by module: [tokens - 1, H] float32. The same on all ranks of a
            tensor and context parallel group.
        """
        found: dict[int, dict[str, np.ndarray]] = {}
        for recorded in self._of_chunk.values():
            for micro_batch, outputs in zip(micro_batches, recorded, strict=True):
                for place, index in enumerate(micro_batch.indices.tolist()):
                    of_index = found.setdefault(index, {})
                    of_index |= {name: parts[place] for name, parts in outputs.items()}
        return dict(found)

    def _cut(self, hidden: Tensor, batch: PackedBatch) -> list[np.ndarray]:
        """Return the part of each sequence, of an output of this rank's positions [*, 1, H]."""
        if self._sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, group=self._parallel.tp
            )
        starts = batch.cu_seqlens_padded.tolist()
        whole_TH = gather_positions(hidden.squeeze(1), starts, self._parallel.cp)
        whole = whole_TH.to("cpu", torch.float32, copy=True).numpy()
        return [
            whole[start : start + length - 1]
            for start, length in zip(starts, batch.lengths, strict=False)
        ]


def _modules(chunk: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of a chunk by the names of their counterparts in Hugging Face's models."""
    if chunk.pre_process:
        yield "model.embed_tokens", chunk.embedding
    for layer in chunk.decoder.layers:
        yield f"model.layers.{layer.layer_number - 1}", layer
    if chunk.decoder.final_layernorm is not None:
        yield "model.norm", chunk.decoder.final_layernorm
