"""tools/gpu_check.py on small sizes without CUDA: its code, not the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "gpu_check.py"

WITH_OTHER_CHECKS = """
import sys
import gpu_check

def raises(sizes, device):
    raise ZeroDivisionError("a fault")

def good(sizes, device):
    return gpu_check.within({"error": 0.1}, 0.2)

def bad(sizes, device):
    return gpu_check.within({"error": 0.3, "other": 0.1}, 0.2)

def lost(sizes, device):
    return gpu_check.within({"error": float("nan")}, 0.2)

gpu_check.CHECKS = {"raises": raises, "bad": bad, "lost": lost, "good": good}
sys.exit(gpu_check.main())
"""


def run(*command):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True,
        text=True,
        cwd=TOOL.parent,
        timeout=280,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.starts_processes
def test_every_check_runs_and_passes_on_small_sizes(tmp_path):
    """On CPU both sides of "update on CPU" are the same code, so its differences are 0; the
    attention is the plain one in bfloat16."""
    out = tmp_path / "result.json"
    code, table, errors = run(str(TOOL), "--device", "cpu", "--out", str(out))
    assert code == 0, table + errors
    result = json.loads(out.read_text())
    rows = {row["check"]: row for row in result["checks"]}
    assert set(rows) == {
        "attention",
        "logits float32",
        "logits bfloat16",
        "update on CPU",
        "packing",
        "logprob memory",
        "step dense",
        "step moe",
    }
    assert all(row["status"] == "passed" for row in rows.values())
    assert all(name in table for name in rows)
    assert result["versions"]["torch"]
    assert result["versions"]["megatron-core"]
    # Neither a comparison of a thing with itself nor of nothing.
    assert 0 < rows["logits float32"]["values"]["moe"] < 1e-4
    assert rows["logits bfloat16"]["values"]["dense/local"] > 0.1
    assert rows["step dense"]["values"]["tokens_per_s"] > 0


@pytest.mark.starts_processes
def test_checks_that_fail_or_raise_do_not_stop_the_others_and_make_the_exit_code_1(tmp_path):
    out = tmp_path / "result.json"
    code, table, _ = run("-c", WITH_OTHER_CHECKS, "--device", "cpu", "--out", str(out))
    assert code == 1
    rows = {row["check"]: row for row in json.loads(out.read_text())["checks"]}
    assert [row["status"] for row in rows.values()] == ["FAILED", "FAILED", "FAILED", "passed"]
    assert rows["raises"]["reason"] == "ZeroDivisionError: a fault"
    assert rows["bad"]["reason"] == "error is 0.3, at most 0.2 allowed"
    assert rows["lost"]["reason"] == "error is nan, at most 0.2 allowed"
    assert "1 of 4 checks passed" in table


@pytest.mark.starts_processes
def test_without_a_cuda_device_it_says_so_and_runs_nothing(tmp_path):
    code, table, _ = run(str(TOOL), "--out", str(tmp_path / "result.json"))
    assert code == 2
    assert "no CUDA device" in table
    assert not any(tmp_path.iterdir())


def test_the_operations_of_a_training_step_are_those_counted_by_hand(monkeypatch):
    """Two tokens, one layer: 4 x 4 weights of q and o, 2 x 4 x 2 of k and v, 3 x 4 x 5 of the MLP,
    4 x 7 of the output layer; two heads of size 2."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import gpu_check

    config = gpu_check.qwen3(
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
    assert gpu_check.training_flops(config, [2]) == pytest.approx(6 * (2 * weights + scores))
