"""The scripts of examples/ as modules; examples/ is no package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_model():
    return load_script(EXAMPLES / "quickstart" / "make_model.py")


@pytest.fixture(scope="session")
def make_data():
    return load_script(EXAMPLES / "quickstart" / "make_data.py")


@pytest.fixture(scope="session")
def load_example():
    """Return a function: (folder, name) -> a script of examples/ as a module."""
    return lambda folder, name: load_script(EXAMPLES / folder / f"{name}.py")
