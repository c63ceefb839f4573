import os
import time

import pytest

from mcore_rl.errors import RunError
from mcore_rl.rewards import forked
from mcore_rl.rewards.forked import call_forked

pytestmark = pytest.mark.starts_processes

LIMITS = {"cpu_s": 20, "limit_s": 60, "memory_bytes": 2**34}


def _raise():
    raise ValueError


def _hang():
    time.sleep(600)
    return True


def test_the_truth_of_what_a_function_returns_comes_back():
    assert call_forked(str.isdigit, "5", **LIMITS) is True
    assert call_forked(str.isdigit, "a", **LIMITS) is False


@pytest.mark.parametrize("function", [_raise, lambda: os._exit(1), lambda: bytes(2**35)])
def test_a_function_that_raises_dies_or_has_too_little_memory_gives_none(function):
    assert call_forked(function, **LIMITS) is None


def test_a_function_that_takes_too_long_gives_none():
    assert call_forked(_hang, **LIMITS | {"limit_s": 1}) is None


def _compute():
    while True:
        pass


def test_a_function_that_computes_for_too_long_gives_none():
    """The limit of wall-clock time does not come into play."""
    assert call_forked(_compute, **LIMITS | {"cpu_s": 1, "limit_s": 3600}) is None


def test_a_copy_that_cannot_be_made_ready_is_an_error_and_no_wrong_answer(monkeypatch):
    def refuse(seconds):
        raise ValueError(f"not allowed to raise the limit to {seconds}")

    monkeypatch.setattr(forked, "limit_cpu", refuse)
    with pytest.raises(RunError, match=r"not made ready: ValueError\('not allowed .* to 5'\)"):
        call_forked(str.isdigit, "5", **LIMITS | {"cpu_s": 5})


def test_the_limit_of_memory_is_for_the_call_however_much_the_process_holds():
    mib = 2**20
    held = bytearray(200 * mib)
    limits = LIMITS | {"memory_bytes": 100 * mib}
    assert call_forked(lambda: bool(bytearray(50 * mib)), **limits) is True
    assert call_forked(lambda: bool(bytearray(150 * mib)), **limits) is None
    del held
