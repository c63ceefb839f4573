"""Containers as far as they can be checked without a daemon: what a Dockerfile copies is there, it
installs what the Makefile installs, and the manifest for Kubernetes starts what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.unit.examples.shell_commands import composed

ROOT = Path(__file__).parents[3]
FILES = {file.stem: file for file in (ROOT / "docker").glob("*.Dockerfile")}
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions(name):
    """Return (instruction, arguments) of a Dockerfile, without comments and line ends."""
    text = re.sub(r"^\s*#.*\n", "", FILES[name].read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_there_is_an_image_for_each_stack():
    assert set(FILES) == {"cpu", "cuda"}


@pytest.mark.parametrize("name", FILES)
def test_a_dockerfile_has_known_instructions_and_begins_with_its_base(name):
    found = instructions(name)
    assert {instruction for instruction, _ in found} <= INSTRUCTIONS
    begin = [instruction for instruction, _ in found if instruction != "ARG"]
    assert begin[0] == "FROM"
    assert begin.count("FROM") == 1
    assert found[-1][0] == "CMD"
    users = [arguments for instruction, arguments in found if instruction == "USER"]
    assert users == ["trainer"], "a run is no business of root"


@pytest.mark.parametrize("name", FILES)
def test_what_a_dockerfile_copies_is_there_before_it_is_installed(name):
    copied = []
    ignored = (ROOT / ".dockerignore").read_text().split()
    for instruction, arguments in instructions(name):
        if instruction == "COPY":
            *sources, _ = arguments.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source not in ignored
            copied += sources
        if instruction == "RUN" and " -e " in arguments:
            assert {"pyproject.toml", "README.md", "LICENSE", "mcore_rl"} <= set(copied)


@pytest.mark.parametrize(
    ("name", "command"),
    [("cpu", "$(BIN)/pip install --quiet "), ("cuda", "$(CUDA_BIN)/pip install ")],
)
def test_an_image_installs_what_the_makefile_installs(name, command):
    makefile = (ROOT / "Makefile").read_text()
    wanted = re.findall(rf"{re.escape(command)}(.*)", makefile)
    assert wanted
    runs = [arguments for instruction, arguments in instructions(name) if instruction == "RUN"]
    assert [
        run.removeprefix("pip install --no-cache-dir ") for run in runs if "pip" in run
    ] == wanted


def test_the_cpu_image_has_the_python_of_its_lock():
    makefile = (ROOT / "Makefile").read_text()
    version = re.search(r"the CPU lock is for Python (\d+\.\d+)", makefile)
    assert version is not None
    assert instructions("cpu")[0] == ("FROM", f"python:{version[1]}-slim-bookworm")


def manifest():
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (found,) = yaml.safe_load_all(block)
    return found


def test_the_manifest_s_command_is_a_configuration_of_its_devices():
    spec = manifest()["spec"]
    command = shlex.split(spec["entrypoint"])
    assert "trainer.launcher=ray" in command
    cfg = composed(command)
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == cfg.trainer.nnodes
    (worker,) = group["template"]["spec"]["containers"]
    for kind in ("requests", "limits"):
        found = worker["resources"][kind]["nvidia.com/gpu"]
        assert int(found) == cfg.trainer.n_gpus_per_node
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    assert spec["backoffLimit"] > 0
    assert cfg.trainer.resume_mode == "auto"


def test_every_pod_has_the_shared_folder_and_shared_memory():
    cluster = manifest()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes.keys() == mounts.keys()
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes["shared"]
