"""Moving the trained weights to the rollout engines.

Transports are one file each, chosen by `rollout.weight_transport`. To add one: a file with a
`Sender`, a `Receiver` and the line that registers both as a `Transport` (`base.py`), and an import
below. A library that only one transport needs, such as a CUDA library, is imported where it is
used: this package is imported before every run. `check.py` tests that tensors arrive exactly as
sent.
"""

from mcore_rl.weight_sync import direct, disk, gloo, ipc, nccl, shared_memory

__all__ = ["direct", "shared_memory", "gloo", "disk", "ipc", "nccl"]
