"""The locks hold every package that pyproject.toml asks for, in a version that it allows.

That the packages of a lock fit each other was resolved with the registry's metadata when it was
made; that they install and run is for `make test` to show, on CUDA for a device.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mcore_rl.megatron.versions import TESTED

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()

STACKS = {
    "cpu": (["cpu"], "3.11", ["cpu", "ray", "dev"]),
    "cuda": (["cuda", "cuda-compiled"], "3.12", ["cuda", "ray"]),
}
"""By name: files, Python, extras."""


def pins(*files: str) -> dict[str, Version]:
    """Return the version of each package of locks; every line is one package, pinned."""
    found = {}
    for file in files:
        for line in (ROOT / "requirements" / f"{file}.lock").read_text().splitlines():
            if not line.startswith("#"):
                name, version = re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line).groups()  # pyright: ignore
                assert canonicalize_name(name) not in found, f"{name} is pinned twice"
                found[canonicalize_name(name)] = Version(version)
    return found


@pytest.mark.parametrize("stack", STACKS)
def test_a_lock_has_what_is_asked_for_in_a_version_that_is_allowed(stack):
    files, python, extras = STACKS[stack]
    found = pins(*files)
    asked = [*PROJECT["dependencies"]]
    for extra in extras:
        asked += PROJECT["optional-dependencies"][extra]
    for text in asked:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            version = found[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), text


@pytest.mark.parametrize("stack", STACKS)
def test_a_lock_has_a_tested_megatron(stack):
    assert str(pins(*STACKS[stack][0])["megatron-core"]) in TESTED


def test_what_is_compiled_comes_after_what_it_is_compiled_with_and_is_of_one_version_with_it():
    first, second = pins("cuda"), pins("cuda-compiled")
    assert set(second) == {"transformer-engine-torch"}
    versions = {first["transformer-engine"], first["transformer-engine-cu13"], *second.values()}
    assert len(versions) == 1
    assert {"torch", "setuptools", "wheel", "ninja"} <= set(first)
    steps = re.findall(r"\$\(CUDA_BIN\)/pip install (.*)", MAKEFILE)
    assert [re.findall(r"requirements/([\w-]+)\.lock", step) for step in steps] == [
        ["cuda"],
        ["cuda-compiled"],
        [],
    ]
    assert "--no-build-isolation" in steps[1]


def test_contracts_are_those_of_the_cuda_lock():
    first = pins("cuda")
    assert pins("contracts") == {name: first[name] for name in pins("contracts")}


def test_the_makefile_asks_for_the_python_of_each_lock():
    for name, python in (("CPU", "3.11"), ("CUDA", "3.12")):
        assert f"the {name} lock is for Python {python}" in MAKEFILE
        assert f"sys.version_info[:2] != ({python.replace('.', ', ')})" in MAKEFILE
