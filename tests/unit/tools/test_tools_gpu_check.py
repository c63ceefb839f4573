"""tools/gpu_check.py on small sizes without CUDA: the checks, not the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[3] / "tools" / "gpu_check.py"


@pytest.fixture
def tool(monkeypatch):
    """Return the tool and its checks as modules."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import gpu_check
    from gpu_checks import programs

    return gpu_check, programs


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


NUMBERS = (
    "stack",
    "attention",
    "logits float32",
    "logits bfloat16",
    "packing",
    "update on CPU",
    "update layers",
    "checkpoint",
    "logprob memory",
    "step dense",
    "step moe",
    "step 128 experts",
)
ENGINE = ("sync moe", "sync dense", "sleep")
RUNS = ("engine apart", "engine of two ranks", "twenty steps")


def test_the_checks_are_those_that_are_run_here(tool):
    _, programs = tool
    assert {name: (*checks,) for name, checks in programs.PROGRAMS.items()} == {
        "numbers": NUMBERS,
        "engine": ENGINE,
        "runs": RUNS,
    }


@pytest.mark.starts_processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(NUMBERS, id="numbers"),
        pytest.param(ENGINE, id="engine"),
        pytest.param(("twenty steps",), id="a run"),
        pytest.param(("engine apart", "engine of two ranks"), id="runs", marks=pytest.mark.slow),
    ],
)
def test_the_checks_run_and_pass_on_small_sizes(tmp_path, names):
    """On CPU both sides of "update on CPU" are the same code, so its differences are 0; the
    attention is the plain one in bfloat16, and an engine that sleeps frees nothing."""
    out = tmp_path / "result.json"
    code, table, errors = run("--device", "cpu", "--out", out, "--only", *names)
    assert code == 0, table + errors
    result = json.loads(out.read_text())
    rows = {row["check"]: row for row in result["checks"]}
    assert tuple(rows) == names
    assert all(row["status"] == "passed" for row in rows.values())
    assert all(name in table for name in names)
    assert result["versions"]["torch"]
    assert result["versions"]["megatron-core"]
    for row in rows.values():
        assert row["bounds"], "something is bounded"
        for bound in row["bounds"]:
            assert bound["value"] <= bound["most"]
            assert len(bound["reason"]) > 10
    # Neither a comparison of a thing with itself nor of nothing.
    values = {name: row["values"] for name, row in rows.items()}
    if names is NUMBERS:
        assert 0 < values["logits float32"]["moe"] < 1e-4
        assert values["logits bfloat16"]["dense/local"] > 0.1
        assert values["step dense"]["tokens_per_s"] > 0
    if names is ENGINE:
        assert 0 < values["sync dense"]["logprob_difference_of_b"] < 1e-5
        assert values["sync moe"]["tokens_of_b_as_of_a"] < 0.9
    if names == ("twenty steps",):
        assert values["twenty steps"]["steps"] == 20
        assert values["twenty steps"]["last_reward"] > values["twenty steps"]["first_reward"] + 0.2


def test_a_check_that_fails_raises_or_is_not_for_this_machine_has_a_row(tool):
    _, programs = tool
    from gpu_checks.outcome import SkippedError, within

    def raises(sizes, device):
        raise ZeroDivisionError("a fault")

    def skips(sizes, device):
        raise SkippedError("needs two devices")

    def row(check):
        return programs.run_check("one", check, "cpu", torch.device("cpu"))

    def of(*errors):
        return row(lambda sizes, device: within(dict(zip("ab", errors, strict=True)), 0.2, "why"))

    assert of(0.1, 0.2)["status"] == "passed"
    assert of(0.1, 0.2)["bounds"][1] == {"name": "b", "value": 0.2, "most": 0.2, "reason": "why"}
    assert of(0.1, 0.3)["status"] == "FAILED"
    assert of(0.1, 0.3)["reason"] == "b is 0.3, at most 0.2 allowed: why"
    assert of(float("nan"), 0.1)["reason"] == "a is nan, at most 0.2 allowed: why"
    assert row(raises)["status"] == "FAILED"
    assert row(raises)["reason"] == "ZeroDivisionError: a fault"
    assert (row(skips)["status"], row(skips)["reason"]) == ("skipped", "needs two devices")
    assert "0.3" in programs.line_of(of(0.1, 0.3))


@pytest.mark.starts_processes
def test_checks_that_their_process_did_not_live_through_failed(tool, monkeypatch):
    gpu_check, _ = tool
    monkeypatch.setattr(sys, "executable", "/bin/false")
    rows = gpu_check.ended("numbers", ["stack", "attention"], "cpu")
    assert [(row["check"], row["status"], row["reason"]) for row in rows] == [
        ("stack", "FAILED", "the process of numbers: exit code 1"),
        ("attention", "FAILED", "the process of numbers: exit code 1"),
    ]


@pytest.mark.parametrize(("status", "expected"), [("passed", 0), ("skipped", 0), ("FAILED", 1)])
def test_a_failed_check_makes_the_exit_code_1(
    tool, monkeypatch, tmp_path, capsys, status, expected
):
    gpu_check, _ = tool
    out = tmp_path / "result.json"
    argv = ["gpu_check", "--device", "cpu", "--out", str(out), "--only", "stack", "sleep"]
    monkeypatch.setattr(sys, "argv", argv)
    ran = []

    def ended(program, names, device):
        ran.append((program, names, device))
        return [{"check": names[0], "status": status}]

    monkeypatch.setattr(gpu_check, "ended", ended)
    assert gpu_check.main() == expected
    assert ran == [("numbers", ["stack"], "cpu"), ("engine", ["sleep"], "cpu")]
    assert len(json.loads(out.read_text())["checks"]) == 2
    passed = 2 if status == "passed" else 0
    assert f"{passed} of 2 checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "devices", "ranks"), [((), 8, "2"), ((), 1, "1"), (("--nproc", "1"), 8, "1")]
)
def test_runs_have_as_many_ranks_as_devices_and_two_at_most(
    tool, monkeypatch, tmp_path, argument, devices, ranks
):
    gpu_check, _ = tool
    argv = ["gpu_check", "--out", str(tmp_path / "result.json"), "--only", "sleep", *argument]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "one")
    monkeypatch.setenv("GPU_CHECK_NPROC", "")
    monkeypatch.setattr(gpu_check, "ended", lambda *_: [])
    assert gpu_check.main() == 0
    assert gpu_check.os.environ["GPU_CHECK_NPROC"] == ranks


@pytest.mark.starts_processes
def test_without_a_cuda_device_it_says_so_and_runs_nothing(tmp_path):
    code, table, _ = run("--out", tmp_path / "result.json")
    assert code == 2
    assert "no CUDA device" in table
    assert not any(tmp_path.iterdir())


def test_the_operations_of_a_training_step_are_those_counted_by_hand(tool):
    """Two tokens, one layer: 4 x 4 weights of q and o, 2 x 4 x 2 of k and v, 3 x 4 x 5 of the MLP,
    4 x 7 of the output layer; two heads of size 2."""
    from gpu_checks.sizes import qwen3
    from gpu_checks.speed import training_flops

    config = qwen3(
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        intermediate_size=5,
    )
    weights = 2 * 16 + 2 * 4 * 2 + 3 * 4 * 5 + 4 * 7
    scores = 2 * 2 * 2**2
    assert training_flops(config, [2]) == pytest.approx(6 * (2 * weights + scores))
