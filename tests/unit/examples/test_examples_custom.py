"""The examples of things of one's own: their own tests pass, and their scripts choose them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

pytestmark = pytest.mark.starts_processes

EXAMPLES = Path(__file__).parents[3] / "examples"
FOLDERS = sorted(EXAMPLES.glob("custom_*"))

CHOSEN = {
    "custom_engine": ("rollout", "name", "transformers"),
    "custom_estimator": ("algorithm", "adv_estimator", "group_median"),
    "custom_loss": ("actor", "penalty_strength", 0.5),
    "custom_reward": ("data", "train_files", "{out}/digits_right/train.parquet"),
    "custom_transport": ("rollout", "weight_transport", "safetensors_files"),
}
"""Folder -> section, key and value of what its script chooses."""


def run(*argv: str, folder: Path, **variables: str) -> str:
    """Return what a command of an example prints; it has to succeed."""
    done = subprocess.run(
        argv,
        cwd=folder,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(EXAMPLES.parent),
        }
        | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["custom_estimator", "custom_reward"])
def test_the_example_s_own_test_passes(name):
    """Those of custom_loss and custom_transport have files of their own here."""
    argv = ("-m", "pytest", "-q", "-p", "no:cacheprovider", ".")
    assert " passed" in run(sys.executable, *argv, folder=EXAMPLES / name)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_script_chooses_what_the_example_adds(tmp_path, name):
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        rows = pa.table({"prompt": ["1+1="], "data_source": ["arithmetic"], "ground_truth": ["2"]})
        pq.write_table(rows, tmp_path / "data" / f"{part}.parquet")
    script = EXAMPLES / name / "run.sh"
    printed = run("bash", str(script), "--cfg", "job", folder=tmp_path, OUT=str(tmp_path))
    section, key, value = CHOSEN[name]
    expected = value.format(out=tmp_path) if isinstance(value, str) else value
    assert yaml.safe_load(printed)[section][key] == expected


def test_the_rows_of_the_reward_name_it(tmp_path):
    rows = {"prompt": ["1+1=", "2+2="], "data_source": ["arithmetic"] * 2, "ground_truth": [2, 4]}
    source, target = tmp_path / "rows.parquet", tmp_path / "new" / "rows.parquet"
    pq.write_table(pa.table(rows), source)
    run(sys.executable, "make_rows.py", str(source), str(target), folder=EXAMPLES / "custom_reward")
    assert pq.read_table(target).to_pydict() == rows | {"data_source": ["digits_right"] * 2}


def test_every_example_is_on_the_page_that_explains_it_with_each_of_its_programs():
    page = (EXAMPLES.parent / "docs" / "extending.md").read_text()
    for folder in FOLDERS:
        for file in folder.glob("*.py"):
            assert f'--8<-- "examples/{folder.name}/{file.name}"\n' in page, file
    assert {folder.name for folder in FOLDERS} == {*CHOSEN, "custom_family"}
