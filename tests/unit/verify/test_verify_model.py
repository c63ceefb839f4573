"""The command before it starts a process, what it compares and what it says."""

from __future__ import annotations

import argparse
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from mcore_rl.models.spec import load_hf_config
from mcore_rl.verify import model
from mcore_rl.verify.__main__ import main
from mcore_rl.verify.model import random_prompts, report
from mcore_rl.verify.model_compare import (
    Difference,
    TransformersModel,
    compare_logprobs,
    largest,
)
from mcore_rl.verify.model_run import Prompts


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    model.add_parser(parser.add_subparsers())
    return parser.parse_args(["model", *argv])


@pytest.fixture(scope="module")
def other_models(tiny_checkpoint, tmp_path_factory):
    """Models that cannot be compared with qwen3_moe, and files that hold no prompts."""
    root = tmp_path_factory.mktemp("others")
    (root / "empty.txt").write_text("\n  \n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    shutil.copytree(tiny_checkpoint("qwen3_moe"), root / "lacks")
    file = root / "lacks" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    return root


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--layout", "tp3"], "actor.megatron.tensor_model_parallel_size=3 does not divide"),
        (["--layout", "tp2y"], "--layout='tp2y' is not made of"),
        (["--layout", "dp3", "--max-processes", "2"], "--max-processes=2 is less than the 3 proc"),
        (["--model", "/none"], "--model='/none' is not a folder"),
        (["--model", "nobody/none"], "--model='nobody/none' is no folder here, and the cache of"),
        (["--model", "{root}/lacks"], "checkpoint {root}/lacks has no tensor 'model.norm.weight'"),
        (["--against", "/none"], "--against='/none' is not a folder"),
        (["--against", "nobody/none"], "--against='nobody/none' is no folder here, and the cac"),
        (["--against", "{root}/lacks"], "checkpoint {root}/lacks has no tensor 'model.norm.wei"),
        (["--against", "{four_layers}"], "--against: num_hidden_layers=4 is not 2, as in --model"),
        (["--prompts", "{root}/none"], "--prompts='{root}/none' cannot be read: "),
        (["--prompts", "{root}/binary.txt"], "--prompts='{root}/binary.txt' cannot be read: "),
        (["--prompts", "{root}/empty.txt"], "--prompts='{root}/empty.txt' holds no line that is"),
        (["--prompts", "x", "--sequences", "3"], "--sequences=3 has no effect with --prompts"),
        (["--prompts", "x", "--max-length", "3"], "--max-length=3 has no effect with --prompts"),
        (["--no-engine", "--max-tokens", "3"], "--max-tokens=3 has no effect with --no-engine"),
        (["--max-length", "120"], "longest prompt + --max-tokens=136 is more than max_position_"),
        (["--max-length", "1"], "--max-length=1 must be at least 2"),
        (["--sequences", "0"], "--sequences=0 must be at least 1"),
        (["--timeout", "0"], "--timeout=0.0 must be greater than 0"),
        (["--tolerance", "nan"], "--tolerance=nan must be greater than 0"),
        (["--dtype", "bfloat16"], "--dtype='bfloat16' has no tolerance of its own"),
        (["--dtype", "float16", "--tolerance", "1"], "actor.megatron.dtype='float16' is not one"),
        (["--json", "/none/at/all.json"], "--json='/none/at/all.json' is in no existing folder"),
        (["rollout.host"], "argument='rollout.host' is no key of the engine"),
        (["actor.optim.lr=1"], "argument='actor.optim.lr=1' is no key of the engine"),
        (["rollout.host=procss"], "rollout.host='procss' is not one of"),
        (["rollout.tensor_model_parallel_size=3"], "rollout.tensor_model_parallel_size=3 does not"),
        (
            ["--no-engine", "rollout.host=process"],
            "rollout.host=process='given' has no effect with --no-engine",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    tiny_checkpoint, other_models, capsys, argv, line
):
    places = {"root": other_models, "four_layers": tiny_checkpoint("qwen3_moe_four_layers")}
    argv, line = [text.format(**places) for text in argv], line.format(**places)
    folder = tiny_checkpoint("qwen3_moe")
    capsys.readouterr()  # transformers shows its progress when it writes a checkpoint
    with pytest.raises(SystemExit) as ended:
        main(["model", "--model", str(folder), *argv])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_random_prompts_are_ragged_and_hang_on_the_seed_alone(tiny_checkpoint, tmp_path):
    hf_config = load_hf_config(tiny_checkpoint("qwen3_moe"))
    args = parse("--model", "m", "--sequences", "40", "--max-length", "12", "--seed", "3")
    prompts = random_prompts(args, hf_config)
    lengths = [len(prompt) for prompt in prompts]
    assert len(lengths) == 40
    assert lengths[0] == max(lengths) == 12
    assert min(lengths) == 2
    assert {token for prompt in prompts for token in prompt} == set(range(61))
    assert random_prompts(args, hf_config) == prompts
    args.seed = 4
    assert random_prompts(args, hf_config) != prompts
    written = Prompts(token_ids=prompts, max_tokens=5, seed=3)
    written.write(tmp_path)
    assert Prompts.read(tmp_path) == written


def test_every_norm_of_what_is_compared_with_has_the_epsilon_of_the_configuration(tiny_checkpoint):
    """As in Megatron and vLLM; transformers gives those inside latent attention another."""
    folder = tiny_checkpoint("deepseek_v2", rms_norm_eps=1e-3)
    modules = TransformersModel(folder, "float32").model.named_modules()
    epsilons = {name: module.variance_epsilon for name, module in modules if "norm" in name}
    assert len(epsilons) == 3 * 4 + 1  # of layers, and the last
    assert set(epsilons.values()) == {1e-3}


SIDES = {
    "transformers": [[-1.0, -2.0, -3.0], [-4.0, -5.0]],
    "Megatron": [[-1.0, -2.0, -3.25], [-4.0, -5.5]],
    "vLLM": [[-3.0], [-5.0]],
}


def test_a_side_that_lacks_the_first_tokens_is_compared_on_the_last():
    found = compare_logprobs(SIDES, "vLLM", "Megatron")
    assert [(one.size, one.where) for one in found] == [
        (0.25, "sequence 1, token 4"),
        (0.5, "sequence 2, token 3"),
    ]


def test_what_is_not_a_number_is_the_largest_wherever_it_stands():
    sizes = [0.5, math.nan, math.inf, 0.1]
    for start in range(4):
        turned = sizes[start:] + sizes[:start]
        found = largest([Difference(size=size, where="") for size in turned])
        assert math.isnan(found.size)


def layers(*sizes):
    names = ["model.embed_tokens", "model.layers.0", "model.norm"]
    return {
        name: Difference(size=size, where="sequence 1")
        for name, size in zip(names, sizes, strict=True)
    }


@pytest.mark.parametrize(
    ("sides", "modules", "tolerance", "code", "lines"),
    [
        (
            SIDES,
            layers(0.0, 1e-7, 2e-7),
            0.6,
            0,
            [
                "Megatron - transformers: 5 log-probabilities agree, by 5.0e-01 (sequence 2, ",
                "vLLM - transformers: 2 log-probabilities agree, by 0.0e+00 (sequence 1, ",
                "vLLM - Megatron: 2 log-probabilities agree, by 5.0e-01 (sequence 2, token 3)",
                "all 3 modules agree, by 2.0e-07 (sequence 1)",
                "passed within 0.6",
            ],
        ),
        (
            {name: SIDES[name] for name in ("transformers", "Megatron")},
            layers(0.0, 0.7, 0.9),
            0.3,
            1,
            [
                "Megatron - transformers: 5 log-probabilities DEPART, by 5.0e-01 (sequence 2, ",
                "first module that departs: model.layers.0, by 7.0e-01 (sequence 1)",
                "FAILED within 0.3",
            ],
        ),
        (
            {"transformers": [[-1.0]], "Megatron": [[math.nan]]},
            layers(0.0, 0.0, math.nan),
            1.0,
            1,
            [
                "Megatron - transformers: 1 log-probabilities DEPART, by nan (sequence 1, token 2)",
                "first module that departs: model.norm, by nan (sequence 1)",
                "FAILED within 1",
            ],
        ),
    ],
)
def test_the_report_names_pairs_and_the_first_module(
    capsys, sides, modules, tolerance, code, lines
):
    assert report(sides, modules, tolerance) == code
    found = capsys.readouterr().out.splitlines()
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start)
