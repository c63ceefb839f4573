"""A type checker holds the arguments of a call to a worker against the method of its role."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.starts_processes

ROOT = Path(__file__).parents[3]

CALLS = """
from mcore_rl.cluster.group import call
from mcore_rl.types import Denominators, Share
from mcore_rl.workers.roles import Actor, WeightSource


def calls(share: Share, counts: Denominators) -> None:
    call(Actor.update, share, counts, None)
    call(Actor.update, share, counts)
    call(Actor.update, counts, share, None)
    call(WeightSource.send_weights, "1", {}, False, True)
    call(WeightSource.send_weight, 1, {})
    call(WeightSource.send_weights, 1, {}, False, True)
"""


def test_a_wrong_argument_of_a_call_to_a_worker_is_found(tmp_path):
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps({"extraPaths": [str(ROOT)], "include": [str(file)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(project)]
    command += ["--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout)["generalDiagnostics"]
    wrong = {CALLS.splitlines()[one["range"]["start"]["line"]].strip() for one in found}
    assert wrong == {
        "call(Actor.update, share, counts)",
        "call(Actor.update, counts, share, None)",
        'call(WeightSource.send_weights, "1", {}, False, True)',
        "call(WeightSource.send_weight, 1, {})",
    }
