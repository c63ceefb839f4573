"""The example of a weight transport of one's own: chosen by its name, without a package file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.starts_processes

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "custom_transport"

# In a process of its own, since a registered transport stays registered.
TRAIN = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.unit.loop.fake_workers import REWARD, FakeWorkers, make_cluster, make_config, make_inputs
from mcore_rl.config.checks import check_run
from mcore_rl.loop.on_policy import train
from mcore_rl.loop.stop import Stop
from mcore_rl.run.folder import open_run_folder
from safetensors_files import FileSender

folder = Path(sys.argv[1])
(folder / "reward.py").write_text(REWARD)
for transport in ("direct", "safetensors_files"):
    cfg = make_config(
        f"rollout.weight_transport={transport}", f"trainer.default_local_dir={folder / transport}"
    )
    check_run(cfg)
    inputs = make_inputs(folder / "reward.py", cfg, 3, 0)
    run_folder = open_run_folder(cfg, inputs.total_steps)
    workers = FakeWorkers(transport=cfg.rollout.weight_transport, run_folder=run_folder)
    train(cfg, inputs, make_cluster(workers, cfg), run_folder, Stop())
    inputs.scorer.close()
assert all(isinstance(sender, FileSender) for sender in workers.senders)
"""


def metrics(run_folder: Path) -> list[dict[str, float]]:
    """Return what every step logged, without what depends on time."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "perf/"))}
        for line in lines
    ]


def test_weights_sent_through_files_train_to_the_same_numbers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), str(ROOT)],
        cwd=EXAMPLE,
        env=os.environ | {"MCORE_RL_PLUGINS": "safetensors_files"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    by_files = metrics(tmp_path / "safetensors_files")
    assert len(by_files) == 3
    assert by_files == metrics(tmp_path / "direct")
    assert not list((tmp_path / "safetensors_files").glob("weights_*"))


def test_the_example_s_own_test_passes():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
