"""Fixtures of more than one folder."""

import gc

import pytest
from hypothesis import settings

from tests.processes import ProcessPool

# The machines that run tests are shared: how long one example took says nothing about the code. The
# examples are the same in every run, so that a change is judged by what it changes; others are
# looked for with `pytest --hypothesis-profile random`.
settings.register_profile("same_examples", deadline=None, derandomize=True, database=None)
settings.register_profile("random", deadline=None)
settings.load_profile("same_examples")


@pytest.hookimpl(tryfirst=True)  # before the tests are chosen by their markers
def pytest_collection_modifyitems(items):
    for item in items:
        if "processes" in item.fixturenames:
            item.add_marker("starts_processes")


def pytest_collection_finish():
    """Have collections pass over what stays: the modules, and the tests themselves."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def processes():
    """Return the processes of the session: `processes.run(function, world_size, *args)`."""
    pool = ProcessPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Return a function: name in `tiny_models.MODELS`, with fields of its config that are
    to differ -> its folder, written once."""
    from tests.tiny_models import save_tiny_checkpoint

    folders = {}

    def folder_of(name, **sizes):
        key = name, *sizes.items()
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("checkpoints") / name
            save_tiny_checkpoint(name, folders[key], **sizes)
        return folders[key]

    return folder_of
