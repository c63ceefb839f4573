"""A machine that is not as it should be. Limits, mounts and names are the kernel's own; nothing of
the doctor is replaced."""

from __future__ import annotations

import json
import os
import resource
import shlex
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mcore_rl.doctor.network import interfaces
from mcore_rl.doctor.site import Site
from mcore_rl.doctor.system import sandbox
from tests.doctor_command import IN_SPACES, doctor, environment, needs_mounts
from tests.sandboxes import make_system_lack

pytestmark = pytest.mark.starts_processes

HOST = socket.gethostname()
SITE = Site(run_folder=Path(), deadline_s=1)


def test_256_open_files_are_found_with_the_command_that_raises_them():
    found = doctor("open-files", before="ulimit -Sn 256")
    assert (found.exit_code, found.statuses()) == (1, {"open-files": "fault"})
    assert found.rows["open-files"]["found"] == "256"
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = 65536 if most == resource.RLIM_INFINITY else min(most, 65536)
    assert found.rows["open-files"]["fix"] == f"ulimit -n {most}"


def test_where_the_shell_may_not_raise_open_files_the_fix_is_the_systems():
    row = doctor("open-files", before="ulimit -n 1023").rows["open-files"]
    assert (row["status"], row["found"]) == ("fault", "1023")
    assert row["fix"].startswith("docker run --ulimit nofile=65536 ")


def test_what_a_shell_commonly_allows_is_enough():
    assert doctor("open-files", before="ulimit -n 1024").statuses() == {"open-files": "ok"}


@needs_mounts
def test_a_full_disk_is_found_where_runs_and_where_temporary_files_are_written(tmp_path):
    full = (
        f"mount -t tmpfs -o size=1m tmpfs {tmp_path}\nhead -c 2M /dev/zero > {tmp_path}/x || true"
    )
    cases: tuple[tuple[dict[str, Any], list, str, str], ...] = (
        ({}, ["--run-folder", tmp_path / "new" / "run"], "runs", "trainer.default_local_dir"),
        ({"TMPDIR": str(tmp_path)}, [], "temporary", "TMPDIR"),
    )
    for variables, argv, name, key in cases:
        found = doctor("disk", *argv, before=full, **variables)
        other = "temporary" if name == "runs" else "runs"
        row = found.rows[f"disk ({name})"]
        assert found.exit_code == 1
        assert found.statuses() == {f"disk ({name})": "fault", f"disk ({other})": "ok"}
        assert row["found"] == f"0.0 of 0.0 GiB free at {tmp_path}: No space left on device"
        assert row["fix"] == (
            f"du -xh -d1 {tmp_path}  # shows what to remove; or name another folder by {key}"
        )


@needs_mounts
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("size=512m", "0.5 of 0.5 GiB free at {}"),
        ("nr_inodes=1,size=2g", "1 inodes are all used: No space left on device"),
        ("ro", "Read-only file system"),
    ],
)
def test_a_disk_that_is_small_without_inodes_or_read_only_is_found(tmp_path, options, text):
    mount = f"mount -t tmpfs -o {options} tmpfs {tmp_path}"
    row = doctor("disk", "--run-folder", tmp_path, before=mount).rows["disk (runs)"]
    assert row["status"] == "fault"
    assert text.format(tmp_path) in row["found"]


def test_a_temporary_folder_that_does_not_exist_is_found(tmp_path):
    found = doctor("disk", TMPDIR=str(tmp_path / "gone"))
    row = found.rows["disk (temporary)"]
    assert (row["status"], row["found"]) == (
        "fault",
        f"No such file or directory at {tmp_path}/gone: No such file or directory",
    )


@needs_mounts
def test_shared_memory_of_a_containers_default_size_is_found():
    found = doctor("shared-memory", before="mount -t tmpfs -o size=64m tmpfs /dev/shm")
    row = found.rows["shared-memory"]
    assert (found.exit_code, row["status"]) == (1, "fault")
    assert row["found"] == "0.06 of 0.06 GiB free"
    assert row["wanted"] == "1 GiB free: two buckets of weights"  # of 512 MiB each
    assert row["fix"].startswith("mount -o remount,size=16G /dev/shm  # ")
    assert row["fix"].endswith("--shm-size 16g")


@needs_mounts
def test_shared_memory_that_killed_processes_have_filled_is_found():
    fill = "mount -t tmpfs -o size=1200m tmpfs /dev/shm\nfallocate -l 600m /dev/shm/left"
    row = doctor("shared-memory", before=fill).rows["shared-memory"]
    assert row["status"] == "fault"
    assert row["fix"].startswith("ls -l /dev/shm ")


def with_hosts(tmp_path, line: str) -> str:
    """Return the shell's lines after which /etc/hosts says this."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{line}\n")
    return f"mount --bind {hosts} /etc/hosts"


@needs_mounts
def test_a_host_name_that_is_127_0_1_1_is_found(tmp_path):
    found = doctor("host-name", before=with_hosts(tmp_path, f"127.0.1.1 {HOST}"))
    row = found.rows["host-name"]
    assert row["found"] == f"{HOST} is 127.0.1.1"
    assert row["status"] == "warning"  # one machine reaches it
    assert row["fix"].startswith('echo "')
    assert f' {HOST}" >> /etc/hosts' in row["fix"]
    assert found.exit_code == 0


ON_TWO_NODES = """
import json, sys
from pathlib import Path
from mcore_rl.doctor.network import host_name
from mcore_rl.doctor.site import Node, Site
node = Node(number=1, count=2, master="192.0.2.7", port=29500)
rows = host_name(Site(run_folder=Path(), deadline_s=1, node=node))
sys.stdout.write(json.dumps([row.to_json() for row in rows]))
"""


@needs_mounts
def test_between_nodes_a_host_name_that_is_a_loopback_address_is_a_fault(tmp_path):
    """As the process of torchrun sees it whose master is at the address of another machine."""
    before = with_hosts(tmp_path, f"127.0.1.1 {HOST}")

    def look(fix: str) -> dict[str, str]:
        run = shlex.join([sys.executable, "-c", ON_TWO_NODES])
        words = [*IN_SPACES, "bash", "-e", "-c", f"{before}\n{fix}\n{run}"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
        (row,) = json.loads(done.stdout)
        return row

    row = look("")
    assert (row["found"], row["status"]) == (f"{HOST} is 127.0.1.1", "fault")
    assert row["fix"].startswith("export GLOO_SOCKET_IFNAME=")
    row = look(row["fix"])
    assert (row["found"], row["status"]) == (f"{HOST} is 127.0.1.1", "warning")


@needs_mounts
def test_a_host_name_that_nobody_knows_is_found(tmp_path):
    hosts = with_hosts(tmp_path, "")
    files = f"echo 'hosts: files' > {tmp_path}/nss\nmount --bind {tmp_path}/nss /etc/nsswitch.conf"
    row = doctor("host-name", before=f"{hosts}\n{files}").rows["host-name"]
    assert row["status"] == "warning"
    assert row["found"].startswith(f"{HOST} is not known: ")


@pytest.mark.parametrize(
    ("variable", "value", "missing"),
    [
        ("GLOO_SOCKET_IFNAME", "nosuch0", "nosuch0"),
        ("NCCL_SOCKET_IFNAME", "=lo,nosuch0", "nosuch0"),
        ("GLOO_SOCKET_IFNAME", "lo", ""),
        ("NCCL_SOCKET_IFNAME", "^nosuch0", ""),  # what NCCL is to leave out
    ],
)
def test_an_interface_that_is_not_there_is_found(monkeypatch, variable, value, missing):
    monkeypatch.setenv(variable, value)
    (row,) = interfaces(SITE)
    assert row.status == ("fault" if missing else "ok")
    if missing:
        assert row.found.startswith(f"{variable}={value}: there is no {missing}; there is ")
        assert row.fix.startswith(f"export {variable}=")


def test_a_kernel_without_a_protection_is_a_warning_that_names_it(monkeypatch):
    make_system_lack(monkeypatch, "confinement._allow_files = refuse")
    (row,) = sandbox(SITE)
    assert row.status == "warning"  # rewards without programs need none
    assert "this system lacks files (files: Landlock of Linux 5.13" in row.found
    assert row.fix.startswith("use Linux 5.13 or later")


def test_a_port_that_is_taken_is_found_with_a_free_one():
    with closing(socket.socket()) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        row = doctor("port", MASTER_PORT=port).rows["port"]
    assert (row["found"], row["status"]) == (f"{port}: {os.strerror(98)}", "warning")
    words = row["fix"].split()
    assert words[:2] == ["torchrun", "--master-port"]
    with closing(socket.socket()) as free:
        free.bind(("", int(words[2])))
