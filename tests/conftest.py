"""Fixtures of more than one folder; makes the modules of this folder importable."""

import pytest
from processes import ProcessPool


@pytest.fixture(scope="session")
def processes():
    """Return the processes of the session: `processes.run(function, world_size, *args)`."""
    pool = ProcessPool()
    yield pool
    pool.close()
