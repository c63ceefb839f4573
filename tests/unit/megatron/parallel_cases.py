"""What the processes of `processes.py` do for the tests of the process groups."""

import dataclasses

import torch.distributed as dist

from mcore_rl.types import Layout


def backends_beside_another(layout: Layout):
    """Return the backend of every group of `Parallel`, by name, where the default group has one
    that does nothing with what lies on the host, as NCCL; and the size of the group of a share."""
    from torch.testing._internal.distributed import fake_pg  # registers it  # noqa: F401

    from mcore_rl.megatron import cpu, parallel

    rank, size = dist.get_rank(), dist.get_world_size()
    cpu.install()
    default = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("beside", default)  # pyright: ignore[reportPrivateImportUsage]
    dist.destroy_process_group()
    dist.init_process_group("fake", store=store, rank=rank, world_size=size)
    groups = parallel.initialize(layout, seed=1)
    found = {
        field.name: dist.get_backend(group)
        for field in dataclasses.fields(groups)
        if isinstance(group := getattr(groups, field.name), dist.ProcessGroup)
    }
    share = dist.get_process_group_ranks(groups.share)
    parallel.shut_down()
    return found, share
