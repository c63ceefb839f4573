"""Runs of the whole loop on fake workers."""

from __future__ import annotations

import functools

import pytest

from tests.unit.loop.loop_runs import run_in


@pytest.fixture
def run_loop(tmp_path):
    """Return a function (*overrides, folder, steps, num_val, reward, **workers) -> Run."""
    return functools.partial(run_in, tmp_path)
