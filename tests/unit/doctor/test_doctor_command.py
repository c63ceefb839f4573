"""The command: its mistakes, its table, what it knows of failures and how nodes are compared."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from mcore_rl.doctor.__main__ import main
from mcore_rl.doctor.checks import ALL_CHECKS
from mcore_rl.doctor.nodes import Rendezvous, Report, differences
from mcore_rl.doctor.rows import Row, Status
from mcore_rl.doctor.site import Node
from mcore_rl.doctor.symptoms import hint, line_of
from tests.doctor_command import LIMIT_S, environment, package


def run(*argv: str, path=(), **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mcore_rl.cli", "doctor", *argv],
        env=environment(*path, **variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize(
    ("argv", "variables", "line"),
    [
        (["torchvison"], {}, "'torchvison' is no check. Did you mean 'torchvision'?"),
        (["--nodes"], {}, "--nodes=True needs torchrun or Ray. On every node: torchrun --nn"),
        (["disk"], {"RANK": "0"}, "torchrun started this process: add --nodes"),
        (["disk", "--quick"], {}, "--quick=True is not read beside names of checks. Leave it out."),
        (["--deadline", "0"], {}, "--deadline=0.0 must be > 0."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, argv, variables, line):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main(argv)
    said = capsys.readouterr()
    assert (caught.value.code, said.out) == (2, "")
    (found,) = said.err.splitlines()
    assert found.startswith(f"error: {line}")


@pytest.mark.starts_processes
def test_the_table_keeps_to_100_columns_and_a_mend_to_one_line(tmp_path):
    source = f"raise RuntimeError('{'long ' * 40}\\x1b[2J')"
    path = package(tmp_path, "ray", "2.60.0", source)
    done = run("ray", "disk", "open-files", path=(path,), COLUMNS="300")
    table, _, rest = done.stdout.partition("fault: ray: ")
    assert max(map(len, table.splitlines())) <= 100
    assert "\x1b" not in done.stdout
    found, fix, verdict = rest.splitlines()
    assert found.endswith("\\x1b[2J")
    assert fix.startswith("  fix: pip install --force-reinstall ")
    assert verdict.startswith("not healthy, in ")
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("RuntimeError: operator torchvision::nms does not exist", "torchvision"),
        ("OSError: libtorchcodec_core7.so: cannot open shared object file", "torchcodec"),
        ("ModuleNotFoundError: No module named 'vllm.config'", "vllm"),
        ("ModuleNotFoundError: No module named 'amp_C'", "apex"),
        ("ImportError: cannot import name 'LLM' from 'vllm' (x.py)", "vllm"),
        (
            "ImportError: cannot import name 'A' from partially initialized module "
            "'transformers.a' (most likely due to a circular import)",
            "transformers",
        ),
        ("RuntimeError: megatron-core 0.30.0 is not supported: this package", "megatron-core"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", "device"),
        ("ValueError: No available memory for the cache blocks. Try", "device"),
        (
            "ValueError: Free memory on device cuda:0 (1.0/139.0 GiB) on startup is less than "
            "desired GPU memory utilization (0.5, 70.0 GiB).",
            "device",
        ),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to", "memory"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/mcore_rl'", "shared-memory"),
        ("worker of rank 0 was ended by SIGBUS", "shared-memory"),
        ("/dev/shm has 1 MiB left, a bucket of weights takes 512: enlarge it", "shared-memory"),
        ("OSError: [Errno 28] No space left on device: 'outputs/x'", "disk"),
        ("OSError: [Errno 24] Too many open files", "open-files"),
        ("DistNetworkError: The server socket has failed ... name: EADDRINUSE", "port"),
        ("RuntimeError: ... ifa != nullptr. Unable to find address for: eth9", "interfaces"),
        ("ncclSystemError: Bootstrap : no socket interface found", "interfaces"),
        ("gaierror: [Errno -2] Name or service not known", "host-name"),
        ("DistBackendError: NCCL error in: x.cpp, ncclUnhandledCudaError", "nccl"),
        ("RuntimeError: Found no NVIDIA driver on your system.", "driver"),
        ("ZeroDivisionError: in the loop", ""),
        ("KeyError: 'vllm'", ""),
        ("RolloutError: the engine returned no tokens", ""),
    ],
)
def test_a_failure_names_the_line_that_explains_it_or_none(failure, line):
    assert line_of(failure) == line
    assert hint(failure) == (f"; mcore-rl doctor {line} says more" if line else "")
    assert line in ("", *ALL_CHECKS)


def test_an_import_that_no_line_explains_names_the_doctor():
    failure = "[role worker, start, rank 0] ImportError: libfoo.so: undefined symbol: x"
    assert line_of(failure) == ""
    assert hint(failure) == "; mcore-rl doctor says more"


def report(number: int, **found: str) -> Report:
    rows = [Row(name=name, found=text, must_match=text) for name, text in found.items()]
    return Report(number, f"host{number}", rows)


def test_of_three_nodes_the_one_that_differs_is_named():
    reports = [report(n, vllm="0.32.0", ray="2.60.0", disk="") for n in range(3)]
    assert differences(reports) == []
    reports[1] = report(1, vllm="0.33.0", ray="2.60.0", disk="")
    (found,) = differences(reports)
    assert (found.name, found.majority) == ("vllm", "0.32.0")
    assert found.outliers == [("node 1 (host1)", "0.33.0")]


def test_of_two_nodes_both_are_named_and_a_line_that_one_lacks_is_a_difference():
    found = differences([report(0, vllm="0.32.0"), report(1, vllm="0.33.0", apex="0.1")])
    assert [(one.name, one.majority, one.outliers) for one in found] == [
        ("vllm", "", [("node 0 (host0)", "0.32.0"), ("node 1 (host1)", "0.33.0")]),
        ("apex", "", [("node 0 (host0)", "no such line"), ("node 1 (host1)", "0.1")]),
    ]


def test_nodes_differ_by_the_status_of_what_they_need_not_have_alike():
    """Free disk is another on every node; that one is full is a difference."""
    good = [Report(n, "h", [Row(name="disk", found=f"{n} GiB")]) for n in range(3)]
    assert differences(good) == []
    full = Report(2, "h", [Row(name="disk", found="0 GiB", status=Status.FAULT)])
    (found,) = differences([*good[:2], full])
    assert (found.majority, found.outliers) == ("ok", [("node 2 (h)", "fault: fault")])


@pytest.mark.parametrize(
    "fields",
    [{}, {"name": "x", "found": "y", "status": "fine"}, {"name": "x", "status": "ok", "more": "z"}],
)
def test_what_is_no_row_is_refused(fields):
    with pytest.raises(ValueError):
        Row.from_json(fields)
    with pytest.raises(ValueError, match="no text"):
        Row.from_json({"name": "x", "found": ["y"], "status": "ok"})
    row = Row(name="a", found="b", status=Status.WARNING, fix="c", must_match="d")
    assert Row.from_json(row.to_json()) == row


def test_a_node_that_does_not_report_or_says_nonsense_is_a_fault(monkeypatch):
    """The store of torchrun is open to whoever reaches its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    rendezvous = Rendezvous(Node(number=0, count=4, master="127.0.0.1", port=port), limit_s=0.2)
    for number, text in ((1, '{"host": "a", "rows": [7]}'), (2, "[" * 200)):
        rendezvous._store.set(f"doctor/report/{number}", text)
    first, *others = rendezvous.reports([Row(name="disk", found="1 GiB")])
    assert [row.status for row in first.rows] == [Status.OK]
    for report in others:
        (row,) = report.rows
        assert (row.name, row.status) == ("report", Status.FAULT)
    assert others[2].rows[0].found.startswith("no report within 0.2 s: ")
    assert differences([first, *others]) == []
