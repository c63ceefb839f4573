"""A run over two machines with addresses of their own: the trainer on the first, an engine on the
second, started by torchrun or, with -m slow, by Ray. The second is killed, and the restarted job
goes on."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.e2e import commands, machines
from tests.e2e.machines import ADDRESSES, Machines

pytestmark = pytest.mark.timeout(3 * commands.TEST_LIMIT_S)

APART = [
    "trainer.n_gpus_per_node=1",
    "actor.megatron.expert_model_parallel_size=1",
    "rollout.host=process",
    "rollout.nnodes=1",
    "rollout.n_gpus_per_node=1",
    "trainer.save_freq=1",
]
NOTICED_S = 30


@pytest.fixture
def two() -> Iterator[Machines]:
    try:
        made = Machines()
    except machines.UnmakeableError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield made
    made.remove()


@pytest.fixture(scope="module")
def unbroken(files, prepared, tmp_path_factory) -> list[dict[str, float]]:
    """Return the metrics of the same run on one machine."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    done = prepared.run(*files.argv(run_dir, *APART))
    assert done.returncode == 0, done.stderr
    return commands.read_metrics(run_dir)


class Launch(Protocol):
    """Starts the run on both machines, and returns the command of the first."""

    def __call__(self, two: Machines, argv: Sequence[str], folder: Path) -> commands.Command: ...


def by_torchrun(two: Machines, argv: Sequence[str], folder: Path) -> commands.Command:
    def start(number: int) -> commands.Command:
        where = f"--master-addr={ADDRESSES[0]} --master-port=29511 --node-rank={number}"
        options = ["--nnodes=2", "--nproc-per-node=1", *where.split()]
        secret = {"MCORE_RL_CHANNEL_SECRET": "5e" * 32}
        module = "torch.distributed.run"
        return two.start(
            number, module, *options, "-m", "mcore_rl.train", *argv, environment=secret
        )

    first = start(0)
    start(1)
    return first


def by_ray(two: Machines, argv: Sequence[str], folder: Path) -> commands.Command:
    """The cluster of the run before, if there is one, is gone with the second machine."""
    two.stop(0)
    address, token = f"{ADDRESSES[0]}:6379", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5e" * 32}
    head = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]
    for number, options in ((0, head), (1, [f"--address={address}"])):
        own = ["--num-cpus=1", f"--node-ip-address={ADDRESSES[number]}", "--block"]
        started = two.start(
            number, "ray.scripts.scripts", "start", *options, *own, environment=token
        )
        assert started.stdout is not None
        told = iter(started.stdout.readline, "")
        assert any("Ray runtime started" in line for line in told), started.communicate()
    environment = token | {"RAY_ADDRESS": address}
    return two.start(0, "mcore_rl.train", *argv, "trainer.launcher=ray", environment=environment)


@pytest.mark.parametrize("launch", [by_torchrun, pytest.param(by_ray, marks=pytest.mark.slow)])
def test_a_machine_that_is_killed_ends_the_run_by_its_name_and_the_next_run_goes_on(
    files, two, unbroken, tmp_path, launch: Launch
):
    run_dir, short = tmp_path / "run", Path(f"/tmp/ray-{two.__hash__() % 10**6}")
    argv = files.argv(run_dir, *APART)
    process = launch(two, argv, short)

    def has_saved() -> bool:
        return len(commands.read_lines(run_dir / "metrics.jsonl")) > 2

    commands.wait_for(has_saved, process)
    killed_at = time.monotonic()
    two.stop(1)
    done = commands.finish(process)
    assert time.monotonic() - killed_at < NOTICED_S
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    # Ray deals out the nodes of a run as it likes.
    assert re.search(rf"node \d\b.*{re.escape(ADDRESSES[1])}", errors[0]), errors

    again = commands.finish(launch(two, argv, short))
    assert again.returncode == 0, again.stderr
    assert commands.read_metrics(run_dir) == unbroken
    shutil.rmtree(short, ignore_errors=True)


def test_a_trainer_over_both_machines_with_engines_beside_it_gives_the_numbers_of_one(
    files, prepared, two, tmp_path
):
    beside = ["rollout.host=process"]
    local = prepared.run(*files.argv(tmp_path / "local", *beside))
    assert local.returncode == 0, local.stderr
    over_both = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
    process = by_torchrun(two, files.argv(tmp_path / "run", *beside, *over_both), tmp_path)
    done = commands.finish(process)
    assert done.returncode == 0, done.stderr
    assert commands.read_metrics(tmp_path / "run") == commands.read_metrics(tmp_path / "local")
    names = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert {"controller-0.log", "worker-0.log", "worker-1.log", "engine-1.log"} <= names
