"""Moving the trained weights to the rollout engines.

Transports are one file each, chosen by `rollout.weight_transport`. To add one: a file with a
`Sender`, a `Receiver` and the line that registers both as a `Transport` (`base.py`), and an import
below. What only one of them needs, a library of CUDA say, it imports where it uses it: this package
is read before every run. `check.py` tests that what is sent is what arrives.
"""

from mcore_rl.weight_sync import direct, disk, gloo, ipc, nccl, shared_memory

__all__ = ["direct", "shared_memory", "gloo", "disk", "ipc", "nccl"]
