"""`mcore-rl verify model`: three implementations agree, and an altered layer is found by name."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e import commands

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

TOLERANCE = 1e-4


def verify(run, model, tmp_path, *argv, **environment):
    """Run the command with its temporary files in `tmp_path`; return how it ended, and its JSON."""
    scratch, numbers = tmp_path / "scratch", tmp_path / "numbers.json"
    scratch.mkdir()
    done = run(
        *("model", "--model", str(model), "--json", str(numbers), *argv),
        module="mcore_rl.verify",
        environment={"TMPDIR": str(scratch)} | environment,
    )
    assert numbers.exists(), done.stdout + done.stderr
    assert list(scratch.glob("verify-model-*")) == []
    return done, json.loads(numbers.read_text())


@pytest.mark.parametrize("of_engine", [(), ("rollout.host=process",)])
def test_transformers_megatron_and_vllm_agree_on_given_prompts(
    files, prepared, tmp_path, of_engine
):
    """Proves the three-way comparison through the real engines of two processes with expert
    parallelism, fed by the weight sync."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1=\n\n12+7=\n3+19=\n")
    argv = ("--layout", "ep2", "--prompts", str(prompts), "--max-tokens", "4", *of_engine)
    done, numbers = verify(prepared.run, files.model, tmp_path, *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded, *lines = done.stdout.splitlines()
    assert re.fullmatch(
        r"vLLM: \d\d parameters from two syncs are the folder's, bit by bit", loaded
    )
    assert [line.split(": ")[0] for line in lines[:3]] == [
        "Megatron - transformers",
        "vLLM - transformers",
        "vLLM - Megatron",
    ]
    assert all(" log-probabilities agree, by " in line for line in lines[:3])
    assert lines[3:5] == [lines[3], "passed within 0.0001"]
    assert lines[3].startswith("all 4 modules agree, by ")
    sides = numbers["logprobs"]
    assert len(numbers["token_ids"]) == 3
    for number, token_ids in enumerate(numbers["token_ids"]):
        assert len(sides["vLLM"][number]) == 4
        for name in ("transformers", "Megatron"):
            found = sides[name][number]
            assert len(found) == len(token_ids) - 1
            assert found[-4:] == pytest.approx(sides["vLLM"][number], rel=0, abs=TOLERANCE)
    # The case means something: the model is not sure of everything.
    assert min(min(values) for values in sides["vLLM"]) < -0.5


def test_an_altered_layer_is_named_and_an_engine_that_cannot_start_is_left_out(
    tiny_checkpoint, tmp_path
):
    """One tensor is altered on Megatron's side; in two stages its layer lies on the second. The
    engine is one that cannot even be imported."""
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM on this machine')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    original, altered = tiny_checkpoint("qwen2_tied"), tmp_path / "altered"
    shutil.copytree(original, altered)
    tensors = load_file(altered / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3] += 0.01
    save_file(tensors, altered / "model.safetensors")
    argv = ("--against", str(original), "--layout", "pp2")
    done, numbers = verify(commands.run, altered, tmp_path, *argv, PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    left_out, pair, first, verdict = done.stdout.splitlines()
    assert left_out.startswith("vLLM is left out: ")
    assert left_out.endswith("ImportError: no vLLM on this machine; mcore-rl doctor says more")
    assert pair.startswith("Megatron - transformers: ")
    assert " log-probabilities DEPART, by " in pair
    assert first.startswith("first module that departs: model.layers.2, by ")
    assert verdict == "FAILED within 0.0001"
    assert numbers["logprobs"].keys() == {"transformers", "Megatron"}
