"""A process with real vLLM engines, and tiny checkpoints for it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import save_tiny_model
from tests.vllm_models import MODELS, make_model

ANSWER_LIMIT_S = 240


@pytest.fixture(scope="session")
def models() -> dict[tuple[str, str], Any]:
    """Two sets of weights for each architecture: ("qwen3", "A") -> transformers model."""
    return {
        (name, version): make_model(name, seed)
        for name in MODELS
        for version, seed in (("A", 1), ("B", 2))
    }


@pytest.fixture(scope="session")
def folders(models, tmp_path_factory) -> dict[tuple[str, str], str]:
    """The same as checkpoints: ("qwen3", "A") -> folder."""
    root: Path = tmp_path_factory.mktemp("checkpoints")
    for (name, version), model in models.items():
        save_tiny_model(name, model, root / f"{name}_{version}")
    return {key: str(root / "_".join(key)) for key in models}


@pytest.fixture(scope="session")
def in_vllm():
    """Return a function (function of vllm_cases, *args) -> its result in the engines' process.

    vLLM changes the process that imports it (threads, logging, a default process group), so it is
    kept out of pytest's own.
    """
    names = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
        return executor.submit(function, *args, **kwargs).result(timeout=ANSWER_LIMIT_S)

    call(int)  # starts the process, which takes the environment with it
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    yield call
    for process in executor._processes.values():
        process.kill()
    executor.shutdown()
