"""A full disk without being root: the kernel refuses to let files of this process grow too long.

The limit holds for every file of the process, also for the one that pytest's own output may go to.
So it surrounds the call that is to fail and nothing that reports.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_no_longer_than(num_bytes: int) -> Iterator[None]:
    """Writing a file past `num_bytes` raises OSError (EFBIG), as ENOSPC on a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
