"""Which versions of Megatron-Core are accepted."""

import pytest

from mcore_rl.megatron import versions


@pytest.fixture
def installed(monkeypatch):
    """Return a function that makes a version of megatron-core the installed one."""
    return lambda number: monkeypatch.setattr(versions, "version", lambda name: number)


@pytest.mark.parametrize("number", [*versions.TESTED, "0.16.2", "0.19.7"])
def test_tested_versions_and_their_patch_releases_are_accepted(installed, number):
    installed(number)
    versions.require_supported_megatron()


@pytest.mark.parametrize("number", ["0.15.3", "0.16.0", "0.20.0", "0.20.0rc1", "1.0.0"])
def test_other_versions_are_refused_by_name(installed, number):
    installed(number)
    with pytest.raises(RuntimeError, match=rf"megatron-core {number} is not supported.*0\.19\.2"):
        versions.require_supported_megatron()
