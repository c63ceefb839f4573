"""The whole doctor on this installation, and on two nodes of which one has another environment."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_rl.doctor.checks import ALL_CHECKS
from tests.doctor_command import LIMIT_S, doctor, environment, package

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


def test_this_installation_is_healthy():
    """Every library is imported and computes something: 18 s on two idle cores."""
    found = doctor()
    assert found.exit_code == 0
    assert {name.split(" ")[0] for name in found.rows} == set(ALL_CHECKS)
    for name in ("torch", "transformers", "megatron-core", "vllm", "forward", "all-reduce gloo"):
        assert found.rows[name]["status"] == "ok", name
    difference = found.rows["forward"]["found"].removeprefix("log-probabilities differ by ")
    assert 0 < float(difference.split(" ")[0]) < 1e-4  # two programs in float32 that agree
    token, logprob = found.rows["token"]["found"].removeprefix("token ").split(", log-probability ")
    assert 0 <= int(token) < 61
    assert -20 < float(logprob) < 0


def free_port() -> int:
    """Return a port that nothing has, below those that the system gives to whoever asks."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def on_nodes(*argv: str, paths: list[tuple[Path, ...]]) -> list[subprocess.CompletedProcess[str]]:
    """Run the command under an agent of torchrun for each of the paths, as on so many nodes."""
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(paths)}"),
                *("--nproc-per-node=1", f"--node-rank={node}", f"--master-port={port}"),
                *("--master-addr=127.0.0.1", "-m", "mcore_rl.cli", "doctor", "--nodes", *argv),
            ],
            env=environment(*path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, path in enumerate(paths)
    ]
    ended = []
    for agent in agents:
        try:
            stdout, stderr = agent.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            agent.kill()
            stdout, stderr = agent.communicate()
        ended.append(subprocess.CompletedProcess(agent.args, agent.returncode, stdout, stderr))
    return ended


def test_of_two_nodes_what_one_has_otherwise_is_named_and_both_end_with_it(tmp_path):
    host = socket.gethostname()
    other = package(tmp_path, "ray", "99.0.0")
    first, second = on_nodes("--json", "python", "ray", "all-reduce", paths=[(), (other,)])
    said = json.loads(first.stdout)
    assert said["healthy"] is False
    assert [node["rows"][1]["name"] for node in said["nodes"]] == ["ray", "ray"]
    (difference,) = said["differences"]
    assert (difference["name"], difference["majority"]) == ("ray", "")
    has = difference["outliers"]
    assert list(has) == [f"node 0 ({host})", f"node 1 ({host})"]
    assert "99.0.0" not in has[f"node 0 ({host})"]
    assert has[f"node 1 ({host})"].endswith("99.0.0")
    for node in said["nodes"]:  # the collective was one of both
        assert node["rows"][-1]["name"] == "all-reduce gloo"
        assert (node["rows"][-1]["status"], node["rows"][-1]["found"]) == (
            "ok",
            "the sum of 2 processes",
        )
    assert (first.returncode, second.returncode) == (1, 1)
    assert second.stdout == ""
