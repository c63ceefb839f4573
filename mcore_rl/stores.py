"""torch's stores for the rendezvous of processes on several machines."""

from __future__ import annotations

import datetime
import socket
from typing import Any

from mcore_rl.lazy_torch import torch


def serve_store(address: str, deadline: datetime.timedelta) -> Any:
    """Return a `TCPStore` of this process that listens on one address alone, at a free port.

    Args:
        address: of this machine.
        deadline: of every wait in it.
    """
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    distributed: Any = torch.distributed
    return distributed.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=deadline,
        master_listen_fd=listener.detach(),
    )
