"""The example of a loss of one's own: chosen by its name, trained with, without a package file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.starts_processes

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "custom_loss"

# In a process of its own, since a registered loss stays registered.
TRAIN = """
import pickle, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.unit.loop.fake_workers import REWARD, FakeWorkers, make_cluster, make_config, make_inputs
from mcore_rl.algorithms.objective import resolve_objective
from mcore_rl.loop.on_policy import train
from mcore_rl.loop.stop import Stop
from mcore_rl.run.folder import open_run_folder

folder = Path(sys.argv[1])
(folder / "reward.py").write_text(REWARD)
cfg = make_config(
    "actor.policy_loss.loss_mode=smooth_ratio",
    "actor.penalty_strength=2",
    f"trainer.default_local_dir={folder / 'run'}",
)
objective = pickle.loads(pickle.dumps(resolve_objective(cfg.actor, 6)))
assert objective.options.penalty_strength == 2.0
workers = FakeWorkers()
before = workers.actor.weights.clone()
inputs = make_inputs(folder / "reward.py", cfg, 1, 0)
run_folder = open_run_folder(cfg, inputs.total_steps)
train(cfg, inputs, make_cluster(workers, cfg), run_folder, Stop())
inputs.scorer.close()
assert not workers.actor.weights.equal(before)
"""


def test_the_loss_trains_a_step_and_logs_its_own_metric(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), str(ROOT)],
        cwd=EXAMPLE,
        env=os.environ | {"MCORE_RL_PLUGINS": "smooth_ratio"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # Of two updates the second finds moved weights.
    assert json.loads(line)["actor/ratio_penalty"] > 0


def test_the_example_s_own_test_passes():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
