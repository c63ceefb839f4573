"""The transport `nccl`: broadcast between CUDA devices, to engines on devices of their own.

vLLM's own communicator and packed broadcast at both ends (`vllm.distributed.weight_transfer`). The
group, of the sender and its receivers, is made with the first update and kept: making one takes
seconds. A device cannot be in it twice, so engines on the trainer's devices use `ipc`.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Deliver,
    Distance,
    Load,
    NamedTensors,
    Receiver,
    Sender,
    Transport,
)

_NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class NcclBroadcast:
    """A bucket that comes by broadcast."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    buffer_size_bytes: int
    address: str
    """Where the group is made."""
    port: int


class NcclSender(Sender[NcclBroadcast]):
    """Rank 0 of the group."""

    _group: Any = None
    _port = 0

    def send(self, bucket: NamedTensors, deliver: Deliver[NcclBroadcast]) -> None:
        if self._group is None:
            self._port = _free_port(self.link.address)
        filled = [(name, tensor.detach()) for name, tensor in bucket]
        update = NcclBroadcast(
            [name for name, _ in filled],
            [str(tensor.dtype).removeprefix("torch.") for _, tensor in filled],
            [list(tensor.shape) for _, tensor in filled],
            max(1, sum(tensor.nbytes for _, tensor in filled)),
            self.link.address,
            self._port,
        )
        pool = ThreadPoolExecutor(1)
        try:
            delivering = pool.submit(deliver, update)
            if delivering.done():
                delivering.result()  # refused before the broadcast
            self._broadcast(filled, update)
            delivering.result()
        finally:
            pool.shutdown(wait=False)

    def _broadcast(self, filled: NamedTensors, update: NcclBroadcast) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        if self._group is None:
            self._group = _join(update, 0, 1 + self.link.num_receivers)
        packed_nccl_broadcast_producer(
            iterator=iter(filled),
            group=self._group,
            src=0,
            post_iter_func=lambda named: named[1],
            buffer_size_bytes=update.buffer_size_bytes,
            num_buffers=_NUM_BUFFERS,
        )

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()
            self._group = None


class NcclReceiver(Receiver[NcclBroadcast]):
    """Another rank of the group."""

    _group: Any = None

    def receive(self, update: NcclBroadcast, load: Load) -> None:
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

        if self._group is None:
            size = 1 + self.link.num_receivers
            self._group = _join(update, 1 + self.link.receiver, size)
        outline = (
            (name, (shape, getattr(torch, dtype_name)))
            for name, dtype_name, shape in zip(
                update.names, update.dtype_names, update.shapes, strict=True
            )
        )
        packed_nccl_broadcast_consumer(
            iterator=outline,
            group=self._group,
            src=0,
            post_unpack_func=load,
            buffer_size_bytes=update.buffer_size_bytes,
            num_buffers=_NUM_BUFFERS,
            device=torch.device("cuda", torch.cuda.current_device()),
        )

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()
            self._group = None


def _join(update: NcclBroadcast, rank: int, size: int) -> Any:
    import torch
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    return stateless_init_process_group(
        master_address=update.address,
        master_port=update.port,
        rank=rank,
        world_size=size,
        device=torch.device("cuda", torch.cuda.current_device()),
    )


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as listener:
        return listener.getsockname()[1]


TRANSPORTS.add(
    "nccl",
    Transport(
        sender=NcclSender,
        receiver=NcclReceiver,
        reaches=frozenset({Distance.SAME_MACHINE, Distance.OTHER_MACHINE}),
    ),
)
