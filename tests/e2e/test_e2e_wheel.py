"""The wheel that `make dist` builds, installed by itself and used from outside the repository.

The other libraries are those of the environment that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

import mcore_rl
from mcore_rl.config.compose import compose_config, parse_command_line, to_yaml
from mcore_rl.config.run import RunConfig
from tests.e2e import commands

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
COMPOSE_ALL = """
import sys
from mcore_rl import sft, train
for name in sys.argv[1:]:
    command = sft if "sft" in name.split("_") else train
    command.main(["--config-name", name, "--cfg", "job"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the sources, in which an earlier build has left a file."""
    source = tmp_path_factory.mktemp("source")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "mcore_rl", source / "mcore_rl", ignore=shutil.ignore_patterns("__pycache__")
    )
    (source / "build" / "lib" / "mcore_rl").mkdir(parents=True)
    (source / "build" / "lib" / "mcore_rl" / "removed_since.py").touch()
    programs = Path(sys.executable).parent
    done = subprocess.run(
        # -o: with the environment as it is.
        ["make", "-o", ".venv/.installed", "dist", f"BIN={programs}"],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").iterdir()
    return built


@dataclass(frozen=True)
class Installed:
    """The wheel in a folder of its own, and an empty folder to work in."""

    packages: Path
    folder: Path

    def run(self, *command: str | Path, **environment: str) -> str:
        """Run the command there and return what it printed."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        here = {"PYTHONPATH": str(self.packages), "PATH": path}
        done = commands.finish(
            subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env=commands.ENVIRONMENT | here | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    packages = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, packages, wheel], check=True, timeout=commands.LIMIT_S)
    place = Installed(packages, tmp_path_factory.mktemp("elsewhere"))
    file = place.run(sys.executable, "-c", "import mcore_rl; print(mcore_rl.__file__)")
    assert Path(file.strip()).is_relative_to(packages), "the repository's package is imported"
    return place


def test_the_wheel_has_every_module_and_recipe_and_says_that_it_is_typed(wheel):
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mcore_rl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"mcore_rl/py.typed", *(f"mcore_rl/recipes/{name}.yaml" for name in RECIPES)} <= files
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files


def test_the_wheel_has_the_version_of_the_package(wheel):
    assert wheel.name == f"mcore_rl-{mcore_rl.__version__}-py3-none-any.whl"


def test_the_installed_command_shows_a_recipe_as_the_repository_composes_it(installed):
    argv = ["--config-name", "gmpo", "model.path=m", "data.train_files=d", "rollout.n=4"]
    shown = installed.run(installed.packages / "bin" / "mcore-rl", "train", *argv, "--cfg", "job")
    assert shown == to_yaml(compose_config(RunConfig, parse_command_line("train", "", argv)))


def test_every_recipe_composes_by_its_name_where_the_wheel_is_installed(installed):
    shown = installed.run(sys.executable, "-c", COMPOSE_ALL, *RECIPES)
    assert shown.count("\ntrainer:\n") == len(RECIPES)


@pytest.mark.slow
def test_the_quickstart_trains_where_the_wheel_is_installed(installed):
    """Its scripts are the repository's, in a copy; the package and the recipes are the wheel's."""
    scripts = installed.folder / "examples" / "quickstart"
    shutil.copytree(ROOT / "examples" / "quickstart", scripts)
    steps = ["trainer.total_training_steps=3", "trainer.test_freq=3", "trainer.save_freq=3"]
    out = installed.folder / "out"
    shown = installed.run(scripts / "run.sh", *steps, OUT=str(out))
    assert "5/5 done" in shown
    run = out / "grpo_geo_mean"
    assert len(commands.read_metrics(run)) == 3
    assert (run / "report.html").is_file()
    assert (run / "hf_model" / "model.safetensors").is_file()
