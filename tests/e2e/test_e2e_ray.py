"""A run that Ray starts: the numbers of the local launcher, in a cluster of its own and as a job of
one that it joins; what the cluster lacks is said; nothing stays behind.

`pytest -m 'slow or not slow' tests/e2e/test_e2e_ray.py` does all of it, in some ten minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e import commands

pytestmark = pytest.mark.timeout(3 * commands.TEST_LIMIT_S)

ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5e" * 32}
COLOCATED: list[str] = []
APART = ["rollout.host=process", "rollout.nnodes=1", "rollout.n_gpus_per_node=2"]
RAY_COMMAND = (sys.executable, "-m", "ray.scripts.scripts")


def ray_processes(folder: Path) -> list[str]:
    """Return the command lines of Ray's processes that have files in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            found += [line] if str(folder) in line and "ray" in process.name() else []
    return found


def wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while left := ray_processes(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Return the temporary directory of a run: short, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize(
    "placed",
    [
        pytest.param(COLOCATED, id="colocated", marks=pytest.mark.slow),
        pytest.param(APART, id="two_engines_apart"),
    ],
)
def test_ray_gives_the_numbers_of_the_local_launcher_and_leaves_nothing(
    files, prepared, tmp_path, temporary, placed
):
    local = prepared.run(*files.argv(tmp_path / "local", *placed))
    assert local.returncode == 0, local.stderr
    by_ray = commands.run(
        *files.argv(tmp_path / "ray", *placed, "trainer.launcher=ray"),
        environment=ENVIRONMENT | {"TMPDIR": str(temporary)},
    )
    assert by_ray.returncode == 0, by_ray.stderr
    metrics = commands.read_metrics(tmp_path / "ray")
    assert metrics == commands.read_metrics(tmp_path / "local")
    assert len(metrics) == 5
    assert list((tmp_path / "ray" / "ray").glob("session_2*/logs")) != []
    assert list(temporary.glob("mcore_rl-*")) == []
    wait_until_gone(temporary)


@pytest.mark.slow
def test_torchrun_gives_the_same_numbers_with_two_engines_apart(files, prepared, tmp_path):
    local = prepared.run(*files.argv(tmp_path / "local", *APART))
    assert local.returncode == 0, local.stderr
    done = commands.run(*files.argv(tmp_path / "torchrun", *APART), torchrun=2)
    assert done.returncode == 0, done.stderr
    assert commands.read_metrics(tmp_path / "torchrun") == commands.read_metrics(tmp_path / "local")


class Cluster:
    """A cluster of one machine with two CPUs, which somebody else started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = [_free_port(), _free_port()]
        self.address, self.jobs = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        head = subprocess.Popen(
            [
                *RAY_COMMAND,
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                f"--port={ports[0]}",
                f"--dashboard-port={ports[1]}",
                f"--temp-dir={folder}",
            ],
            env=commands.ENVIRONMENT | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._nodes = [head]

    def submit(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m mcore_rl.train` as a job, and wait for it."""
        command = [*RAY_COMMAND, "job", "submit", f"--address={self.jobs}", "--", sys.executable]
        environment = commands.ENVIRONMENT | ENVIRONMENT
        deadline = time.monotonic() + 120
        while True:  # until the dashboard answers
            done = subprocess.run(
                [*command, "-m", "mcore_rl.train", *argv],
                env=environment,
                capture_output=True,
                text=True,
                timeout=commands.LIMIT_S,
                check=False,
            )
            if "Failed to connect" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)

    def join(self, open_files: int) -> None:
        """Start a second node, on this machine, that may open so many files."""
        start = [*RAY_COMMAND, "start", "--block", f"--address={self.address}", "--num-cpus=1"]
        self._nodes.append(
            subprocess.Popen(
                ["bash", "-c", f'ulimit -n {open_files} && exec "$@"', "bash", *start],
                env=commands.ENVIRONMENT | ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def end(self) -> None:
        for process in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self._nodes:
            node.wait(60)
        wait_until_gone(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _children(self) -> list[psutil.Process]:
        nodes = [psutil.Process(node.pid) for node in self._nodes]
        return [*nodes, *(child for node in nodes for child in node.children(recursive=True))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(Path(f"/tmp/ray-test-{os.getpid()}"))
    yield made
    made.end()


@pytest.mark.slow
def test_a_job_of_a_cluster_gives_the_same_numbers_and_fails_when_the_run_fails(
    files, prepared, cluster, tmp_path
):
    local = prepared.run(*files.argv(tmp_path / "local"))
    assert local.returncode == 0, local.stderr
    done = cluster.submit(*files.argv(tmp_path / "job", "trainer.launcher=ray"))
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = commands.read_metrics(tmp_path / "job")
    assert metrics == commands.read_metrics(tmp_path / "local")

    overrides = ["trainer.launcher=ray", "reward.on_error=raise"]
    failed = cluster.submit(*files.argv(tmp_path / "failed", *overrides))
    assert failed.returncode == 1
    assert "no score for this one" in failed.stdout + failed.stderr


def test_a_cluster_that_is_too_small_is_told_what_it_lacks(files, cluster, tmp_path):
    cluster.submit("--help")  # it is up
    done = commands.run(
        *files.argv(tmp_path / "run", "trainer.launcher=ray", "trainer.n_gpus_per_node=4"),
        environment=ENVIRONMENT | {"RAY_ADDRESS": cluster.address},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: the Ray cluster is too small: wanted 4 CPU, each on one node; the nodes have 2 CPU."
    )
    assert not (tmp_path / "run").exists()


def test_the_doctor_says_which_node_of_a_cluster_differs(cluster):
    """The last test of the cluster: it has two nodes from here on."""
    cluster.submit("--help")  # it is up
    cluster.join(open_files=512)
    deadline = time.monotonic() + 120
    while True:  # until the second node has joined
        done = commands.run(
            *("--nodes", "--json", "python", "open-files"),
            module="mcore_rl.doctor",
            environment=ENVIRONMENT | {"RAY_ADDRESS": cluster.address},
        )
        said = json.loads(done.stdout)
        if len(said["nodes"]) == 2 or time.monotonic() > deadline:
            break
    assert done.returncode == 1, done.stderr
    (difference,) = said["differences"]
    assert difference["name"] == "open-files"
    host = socket.gethostname()
    assert set(difference["outliers"]) == {f"node 0 ({host})", f"node 1 ({host})"}
    first, second = sorted(difference["outliers"].values(), key=lambda text: text != "fault: 512")
    assert first == "fault: 512"
    assert not second.startswith("fault")


def test_no_cluster_at_the_address_is_one_line(files, tmp_path):
    address = f"127.0.0.1:{_free_port()}"
    done = commands.run(
        *files.argv(tmp_path / "run", "trainer.launcher=ray"),
        environment=ENVIRONMENT | {"RAY_ADDRESS": address},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: RAY_ADDRESS={address} cannot be joined: "
    )


def test_a_driver_that_is_killed_leaves_nothing_running(files, tmp_path, temporary):
    run_dir = tmp_path / "run"
    argv = files.argv(run_dir, "trainer.launcher=ray", "trainer.total_training_steps=400")
    process = commands.start(*argv, environment=ENVIRONMENT | {"TMPDIR": str(temporary)})
    commands.wait_for(lambda: bool(commands.read_lines(run_dir / "metrics.jsonl")), process)
    assert ray_processes(temporary)
    process.send_signal(signal.SIGKILL)
    wait_until_gone(temporary)
    process.communicate()
