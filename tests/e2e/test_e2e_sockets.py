"""What a run on one machine listens on: loopback alone, where a stranger does no harm."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import psutil
import pytest

from tests.e2e import commands


def listening(process) -> set[tuple[str, int]]:
    """Return the addresses at which the command and everything that it started accept or receive
    over the network."""
    found = set()
    root = psutil.Process(process.pid)
    for member in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in member.net_connections(kind="inet"):
                is_open = connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
                if is_open and connection.laddr:
                    found.add(tuple(connection.laddr))
    return found


def send_garbage(address: tuple[str, int]) -> None:
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as stranger:
        stranger.sendall(b"\x80\x05cos\nsystem\n(S'true'\ntR." * 100)


@pytest.mark.timeout(2 * commands.TEST_LIMIT_S)
@pytest.mark.parametrize(
    ("processes", "host"), [(1, "in_process"), (2, "in_process"), (2, "process")]
)
def test_a_local_run_listens_on_loopback_alone_and_strangers_do_not_disturb_it(
    files, prepared, tmp_path, processes, host
):
    overrides = [
        f"trainer.n_gpus_per_node={processes}",
        f"actor.megatron.expert_model_parallel_size={processes}",
        f"rollout.host={host}",
    ]
    process = prepared.start(*files.argv(tmp_path / "run", *overrides))
    seen: set[tuple[str, int]] = set()
    metrics = tmp_path / "run" / "metrics.jsonl"

    def has_stepped() -> bool:
        seen.update(listening(process))
        return bool(commands.read_lines(metrics))

    commands.wait_for(has_stepped, process)
    assert [address for address in seen if not ipaddress.ip_address(address[0]).is_loopback] == []
    if processes > 1:
        assert seen  # gloo's
    for address in seen:
        send_garbage(address)
    done = commands.finish(process)
    assert done.returncode == 0, done.stderr
    assert len(commands.read_metrics(tmp_path / "run")) == 5
