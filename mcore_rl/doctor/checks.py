"""Every check by the name of its line, and how they are run: a new one is a function and a line
here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mcore_rl.doctor import devices, live, network, symptoms, system, versions
from mcore_rl.doctor.rows import Row, Status, explained_by
from mcore_rl.doctor.site import Site

Check = Callable[[Site], list[Row]]

CHECKS: Mapping[str, Check] = {
    "mcore-rl": versions.own_package,
    "python": versions.python,
    "torch": versions.torch,
    "torchvision": partial(versions.companion, "torchvision"),
    "torchaudio": partial(versions.companion, "torchaudio"),
    "torchcodec": partial(versions.companion, "torchcodec"),
    **{
        one.name: partial(versions.library, one)
        for one in versions.LIBRARIES
        if one is not versions.TORCH
    },
    "dependencies": versions.dependencies,
    "driver": devices.driver,
    "cuda-toolkit": devices.toolkit,
    "nccl": devices.nccl,
    "device": devices.devices,
    "memory": system.memory,
    "shared-memory": system.shared_memory,
    "open-files": system.open_files,
    "disk": system.disk,
    "sandbox": system.sandbox,
    "host-name": network.host_name,
    "interfaces": network.interfaces,
    "port": network.port,
    "environment": network.environment,
}
"""Checks that only look, or import."""
LIVE_CHECKS: Mapping[str, Check] = {
    "all-reduce": live.all_reduce,
    "forward": live.forward,
    "token": live.token,
}
"""Checks that compute something."""
ALL_CHECKS = {**CHECKS, **LIVE_CHECKS}

_MOST_AT_ONE_TIME = 4
"""Checks, for they import libraries of some hundred megabytes."""


def run_checks(names: Iterable[str], site: Site) -> list[Row]:
    """Return the rows of the checks, in the order of `ALL_CHECKS`."""
    chosen = set(names)
    num_threads = min(os.cpu_count() or 1, _MOST_AT_ONE_TIME)
    with ThreadPoolExecutor(num_threads) as pool:
        # The longest first.
        pending = {
            name: pool.submit(_run, name, site) for name in [*LIVE_CHECKS][::-1] if name in chosen
        }
        pending |= {name: pool.submit(_run, name, site) for name in CHECKS if name in chosen}
        return [row for name in ALL_CHECKS if name in chosen for row in pending[name].result()]


def _run(name: str, site: Site) -> list[Row]:
    try:
        return ALL_CHECKS[name](site)
    except Exception as error:  # noqa: BLE001  a check that fails is a finding
        found = f"the check failed: {type(error).__name__}: {error}"
        line = symptoms.line_of(found)  # no room for a probe's log, no file left to open
        if isinstance(error, ModuleNotFoundError):
            line = "dependencies"
        fix = explained_by(line) if line and line != name else ""
        return [Row(name=name, found=found, status=Status.FAULT, fix=fix)]
