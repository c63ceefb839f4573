"""The command before it starts a process, and its table."""

from __future__ import annotations

import argparse
import json

import pytest

from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.models.spec import load_hf_config
from mcore_rl.verify import layouts
from mcore_rl.verify.__main__ import main
from mcore_rl.verify.compare import Difference
from mcore_rl.verify.layout_run import read_minibatch, write_minibatch
from mcore_rl.verify.layouts import Row, cells, random_minibatch, table_line, to_json
from tests.sequences import lists_of


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    layouts.add_parser(parser.add_subparsers())
    return parser.parse_args(["layouts", *argv])


@pytest.mark.parametrize(
    ("name", "max_processes", "expected"),
    [
        ("qwen3", 2, "dp1 dp2 tp2 tp2sp0 pp2 cp2"),
        ("qwen3", 1, "dp1"),
        ("qwen2_tied", 4, "dp1 dp2 tp2 tp2sp0 pp2 pp2vpp2 cp2 tp2pp2 tp2cp2"),
        ("qwen3_moe", 4, "dp1 dp2 tp2 pp2 cp2 ep2 tp2ep2etp1 tp2pp2 tp2cp2 pp2ep2 ep2dp4 "
                         "tp2pp2ep2etp1"),
    ],
)  # fmt: skip
def test_without_layouts_all_candidates_that_fit_are_run(
    tiny_checkpoint, name, max_processes, expected
):
    folder = tiny_checkpoint(name)
    args = parse("--model", str(folder), "--max-processes", str(max_processes))
    chosen = layouts.chosen_layouts(args, load_hf_config(folder))
    assert [layout.name for layout in chosen] == expected.split()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--layouts", "tp3"], "--layouts tp3: actor.megatron.tensor_model_parallel_size=3 does"),
        (["--layouts", "tp2,pp3"], "--layouts pp3: actor.megatron.pipeline_model_parallel_size=3"),
        (["--layouts", "tp2sp0"], "--layouts tp2sp0: actor.megatron.sequence_parallel=False"),
        (["--layouts", "vpp2"], "--layouts vpp2: actor.megatron.virtual_pipeline_model_parallel_"),
        (["--layouts", "ep2dp3"], "--layouts ep2dp3: trainer.n_gpus_per_node * trainer.nnodes=3"),
        (
            ["--layouts", "dp3", "--max-processes", "2"],
            "--layouts dp3: --max-processes=2 is less than the 3 processes that",
        ),
        (["--layouts", "tp2y"], "--layouts='tp2y' is not made of"),
        (["--loss", "geomean"], "actor.policy_loss.loss_mode='geomean': there is no such policy"),
        (["--dtype", "float16"], "actor.megatron.dtype='float16' is not one of"),
        (["--max-length", "129"], "--max-length=129 is more than max_position_embeddings=128"),
        (["--max-length", "1"], "--max-length=1 must be at least 2"),
        (["--micro-batches", "0"], "--micro-batches=0 must be greater than 0"),
        (["--sequences", "-1"], "--sequences=-1 must be greater than 0"),
        (["--tolerance", "nan"], "--tolerance=nan must be greater than 0"),
        (["--json", "/none/at/all.json"], "--json='/none/at/all.json' is in no existing folder"),
        (["--model", "/none"], "--model='/none' is not a folder"),
        (["--model", "nobody/none"], "--model='nobody/none' is no folder here, and the cache of"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(tiny_checkpoint, capsys, argv, line):
    folder = tiny_checkpoint("qwen3_moe")
    capsys.readouterr()  # transformers shows its progress when it writes a checkpoint
    with pytest.raises(SystemExit) as ended:
        main(["layouts", "--model", str(folder), *argv])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_the_minibatch_is_ragged_and_hangs_on_the_seed_alone(tmp_path):
    args = parse("--model", "m", "--sequences", "40", "--max-length", "12", "--seed", "3")
    sequences = random_minibatch(args, 7)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    assert lengths[0] == max(lengths) == 12
    assert min(lengths) == 1
    assert {token for sequence in sequences for token in sequence.token_ids} == set(range(7))
    assert sequences[0].num_trained_tokens > 0
    assert not all(all(sequence.loss_mask[1:]) for sequence in sequences)
    for sequence in sequences:
        assert not sequence.loss_mask[0]
        assert sequence.advantages is not None
        trained = {a for a, m in zip(sequence.advantages, sequence.loss_mask, strict=True) if m}
        assert len(trained) <= 1
        assert all(a == 0 for a in set(sequence.advantages) - trained)
    numbers = [lists_of(s) for s in sequences]
    assert [lists_of(s) for s in random_minibatch(args, 7)] == numbers
    args.seed = 4
    assert [lists_of(s) for s in random_minibatch(args, 7)] != numbers
    write_minibatch(tmp_path, sequences)
    assert [lists_of(s) for s in read_minibatch(tmp_path)] == numbers


@pytest.mark.parametrize("name", ["plain", "a b", "it's", "a,b=c", "[x]{y}", 'say "so"', "100$"])
def test_a_path_of_any_characters_reaches_the_run(tmp_path, name):
    folder = tmp_path / name
    argv = [f"model.path={layouts.quoted(folder)}"]
    assert compose_config(RunConfig, parse_command_line("p", "", argv)).model.path == str(folder)


def row(**changed) -> Row:
    return Row(**{"layout": "tp2", "processes": 2, "seconds": 8.6} | changed)


def difference(measure: str, size: float) -> Difference:
    return Difference(measure=measure, where="model.norm.weight", size=size, limit=1e-5)


TRAINED = {"updates": [{}, {"actor/loss": -0.25, "actor/grad_norm": 1.5}]}


@pytest.mark.parametrize(
    ("shown", "numbers", "result"),
    [
        (row(**TRAINED), "-0.2500000    1.5000000         -         -", "reference"),
        (
            row(**TRAINED, differences=[difference("weights", 1e-6), difference("updates", 1e-5)]),
            "-0.2500000    1.5000000   1.0e-06   1.0e-05",
            "agrees",
        ),
        (
            row(**TRAINED, differences=[difference("weights", 2e-5), difference("updates", 0.3)]),
            "-0.2500000    1.5000000   2.0e-05   3.0e-01",
            "departs: weights by 2.0e-05 (model.norm.weight), "
            "updates by 3.0e-01 (model.norm.weight)",
        ),
        (
            row(failure="ended by SIGKILL"),
            "         -            -         -         -",
            "failed: ended by SIGKILL",
        ),
    ],
)
def test_a_row_of_the_table_says_what_came_out(shown, numbers, result):
    line = table_line(3, *cells(shown))
    assert line == f"tp2          2   {numbers}     9 s  {result}"


def test_the_numbers_of_all_rows_are_json():
    found = row(**TRAINED, differences=[difference("weights", 2e-5)])
    assert json.loads(to_json([row(**TRAINED), found], 1e-5)) == {
        "tolerance": 1e-5,
        "layouts": [
            {
                "layout": "tp2",
                "processes": 2,
                "seconds": 8.6,
                **TRAINED,
                "differences": differences,
                "failure": "",
                "result": result,
            }
            for differences, result in [
                ([], "reference"),
                (
                    [
                        {
                            "measure": "weights",
                            "where": "model.norm.weight",
                            "size": 2e-5,
                            "limit": 1e-5,
                        }
                    ],
                    "departs: weights by 2.0e-05 (model.norm.weight)",
                ),
            ]
        ],
    }
