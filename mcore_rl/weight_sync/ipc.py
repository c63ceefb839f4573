"""The transport `ipc`: a CUDA buffer that another process of the same device opens.

vLLM's own packing at both ends (`vllm.distributed.weight_transfer.packed_tensor`): the sender
copies a bucket into a buffer, the update carries its handle, the receiver clones the tensors. A
buffer is written again only when the previous update has been answered. There is one receiver,
since a handle is valid only on its device: an engine on several devices has a sender on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import require
from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Deliver,
    Distance,
    Link,
    Load,
    NamedTensors,
    Receiver,
    Sender,
    Transport,
)


@dataclass(frozen=True, slots=True)
class InDeviceBuffer:
    """A bucket that lies in a buffer of the sender's device; fields of vLLM's `PackedIpcChunk`."""

    names: list[str]
    shapes: list[list[int]]
    dtype_names: list[str]
    tensor_sizes: list[int]
    ipc_handle: dict[str, tuple[Any, ...]]


class IpcSender(Sender[InDeviceBuffer]):
    """Copies buckets into a buffer."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        rule = f"reaches one device, and the engine has {link.num_receivers}"
        fix = "Use nccl, or rollout.tensor_model_parallel_size=1."
        require(link.num_receivers == 1, "rollout.weight_transport", "ipc", rule, fix)

    def send(self, bucket: NamedTensors, deliver: Deliver[InDeviceBuffer]) -> None:
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

        filled = [(name, tensor.detach()) for name, tensor in bucket]
        device = filled[0][1].device
        chunks = packed_ipc_producer(
            iterator=iter(filled),
            gpu_uuid=str(torch.cuda.get_device_properties(device).uuid),
            post_iter_func=lambda named: named[1],
            buffer_size_bytes=max(1, sum(tensor.nbytes for _, tensor in filled)),
        )
        for chunk in chunks:
            deliver(
                InDeviceBuffer(
                    chunk.names,
                    chunk.shapes,
                    chunk.dtype_names,
                    chunk.tensor_sizes,
                    chunk.ipc_handle,
                )
            )

    def end(self) -> None:
        import torch

        torch.cuda.ipc_collect()


class IpcReceiver(Receiver[InDeviceBuffer]):
    """Clones the tensors out of the buffer."""

    _importer: Any = None

    def receive(self, update: InDeviceBuffer, load: Load) -> None:
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import (
            PackedBufferImporter,
            packed_ipc_consumer,
        )

        if self._importer is None:
            self._importer = PackedBufferImporter()
        tensors = packed_ipc_consumer(
            ipc_handle=update.ipc_handle,
            names=update.names,
            shapes=update.shapes,
            dtype_names=update.dtype_names,
            tensor_sizes=update.tensor_sizes,
            device_index=torch.cuda.current_device(),
            importer=self._importer,
        )
        load(tensors)

    def end(self) -> None:
        if self._importer is not None:
            self._importer.close()


TRANSPORTS.add(
    "ipc",
    Transport(sender=IpcSender, receiver=IpcReceiver, reaches=frozenset({Distance.SAME_MACHINE})),
)
