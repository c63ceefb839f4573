"""Transformer Engine's layers hold what the local ones hold, under the names of the mapping."""

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.starts_processes,
    pytest.mark.skipif(
        not any(distributions(name="transformer_engine_torch")),
        reason="Transformer Engine's extension for torch is not installed: it has to be compiled",
    ),
]


def test_every_parameter_has_the_local_layers_name_shape_and_type(tmp_path):
    """In every family and layout, on every rank; and the same names and shapes in checkpoints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.megatron.te_layers", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differing"] == []
    assert found["parameters"] > 5_000
    assert found["saved"] > 4_000
    assert set(found["kinds"]) >= {
        "TEGroupedMLP",
        "TELayerNormColumnParallelLinear",
        "TERowParallelGroupedLinear",
        "TERowParallelLinear",
    }
