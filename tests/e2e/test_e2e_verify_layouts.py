"""`mcore-rl verify layouts`: layouts agree, and one that departs or fails does not go unseen."""

from __future__ import annotations

import json
import textwrap

import pytest

from tests.e2e import commands

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

# What a loss must not do: it averages over its micro-batch, so the gradient hangs on how the
# minibatch is cut. In two processes it fails in a rank other than the controller's.
PLUGIN = """
    import torch.distributed as dist

    from mcore_rl.algorithms.losses import POLICY_LOSSES, TokenLoss
    from mcore_rl.options import NoOptions

    @POLICY_LOSSES.register("local_mean", config=NoOptions, needs_old_logprobs=False)
    def local_mean(inputs, cfg):
        if dist.get_world_size() == 2 and dist.get_rank() == 1:
            raise RuntimeError("no second process")
        num_tokens = inputs.segments.mask_T.sum().clamp(min=1)
        return TokenLoss(-100 * inputs.advantages_T * inputs.logprobs_T / num_tokens, {})
"""


def verify(prepared, model, tmp_path, *argv, **environment):
    """Run the command with its temporary files in `tmp_path`; return how it ended, its rows by
    layout, and the JSON that it wrote."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    numbers = tmp_path / "numbers.json"
    done = prepared.run(
        "layouts",
        *("--model", str(model), "--json", str(numbers), *argv),
        module="mcore_rl.verify",
        environment={"TMPDIR": str(scratch)} | environment,
    )
    assert numbers.exists(), done.stderr
    # torch's compiler keeps a cache of its own there
    assert list(scratch.glob("verify-layouts-*")) == []
    _, *lines, _ = done.stdout.splitlines()
    return done, {line.split()[0]: line for line in lines}, json.loads(numbers.read_text())


def test_a_tiny_mixture_of_experts_is_the_same_in_every_layout(prepared, tiny_checkpoint, tmp_path):
    """Proves that expert, tensor and expert-tensor parallelism agree with one process through the
    command itself; test_distributed_invariance proves all layouts and losses."""
    layouts = ("ep2", "tp2etp1")
    done, rows, numbers = verify(
        prepared, tiny_checkpoint("qwen3_moe"), tmp_path, "--layouts", ",".join(layouts)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows) == ["one", *layouts]
    assert all(rows[name].endswith("agrees") for name in layouts)
    reference, *found = numbers["layouts"]
    assert [row["processes"] for row in found] == [2, 2]
    # The case means something: tokens were clipped, and the second update saw other weights.
    first, second = reference["updates"]
    assert 0 < first["actor/clip_frac"] < 1
    assert abs(first["actor/grad_norm"] - second["actor/grad_norm"]) > 0.01
    for row in found:
        assert [d["measure"] for d in row["differences"]] == [
            "loss",
            "grad norm",
            "weights",
            "updates",
        ]
        # Another order of sums does not give the same bits: the layouts really differ.
        assert 0 < row["differences"][3]["size"] < 1e-3


def test_a_loss_that_hangs_on_the_cut_departs_and_a_crash_is_a_row(
    prepared, tiny_checkpoint, tmp_path
):
    (tmp_path / "local_mean.py").write_text(textwrap.dedent(PLUGIN))
    done, rows, numbers = verify(
        prepared,
        tiny_checkpoint("qwen3"),
        tmp_path,
        *("--loss", "local_mean", "--layouts", "dp2,dp1"),
        MCORE_RL_PLUGINS="local_mean",
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert list(rows) == ["one", "dp2", "dp1"]
    assert "failed: " in rows["dp2"]
    assert "no second process" in rows["dp2"]
    assert "departs: loss by" in rows["dp1"]
    assert "grad norm by" in rows["dp1"]
    assert "(model." in rows["dp1"]
    assert done.stdout.splitlines()[-1] == "0 of 2 layouts agree with one process within 1e-05"
    assert [row["result"].split()[0] for row in numbers["layouts"]] == [
        "reference",
        "failed:",
        "departs:",
    ]
