"""Plans of runs that no test machine could start: 64 devices, a model of 30 billion parameters.

Against real workers the plan is tested in tests/distributed/test_distributed_plan.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcore_rl.cluster.phases import Phase
from mcore_rl.cluster.placement import colocated, expert_dp_size
from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.errors import UserError
from mcore_rl.models.spec import model_family
from mcore_rl.plan.memory import (
    StageMemory,
    activation_memory,
    export_memory,
    kv_bytes_per_token,
    save_memory,
    state_memory,
)
from mcore_rl.plan.moments import EngineMemory, fullest_moments, most_host_memory, phases_of
from mcore_rl.plan.parameters import ParameterCounts, StageParameters, model_size, stage_layers
from mcore_rl.plan.report import write_plan
from mcore_rl.plan.step import plan_step, prompt_lengths
from mcore_rl.types import Layout, Offloads, Part
from tests.published_models import DEEPSEEK_V3, QWEN3_30B_A3B, QWEN3_235B_A22B

LAYOUT = Layout(tp=4, pp=2, ep=8, dp=8)
NUM_ROWS = 64


@pytest.fixture
def argv(tmp_path):
    """Return the arguments of a run on 8 x 8 devices, with nothing but config.json and data."""
    QWEN3_30B_A3B.save_pretrained(tmp_path)
    rows = [
        {"prompt": "x" * 4 * (i + 1), "ground_truth": "1", "data_source": "math"}
        for i in range(NUM_ROWS)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *["--config-name", "gmpo", f"model.path={tmp_path}"],
        f"data.train_files={tmp_path / 'train.jsonl'}",
        "data.train_batch_size=64",
        "data.max_response_length=512",
        "rollout.n=4",
        "actor.ppo_mini_batch_size=16",
        "actor.ppo_max_token_len_per_gpu=2048",
        "actor.megatron.tensor_model_parallel_size=4",
        "actor.megatron.pipeline_model_parallel_size=2",
        "actor.megatron.expert_model_parallel_size=8",
        "actor.megatron.expert_tensor_parallel_size=1",
        "trainer.nnodes=8",
        "trainer.n_gpus_per_node=8",
    ]


def config(argv, *overrides):
    line = parse_command_line("train", "", [*argv, "trainer.dry_run=true", *overrides])
    cfg = compose_config(RunConfig, line)
    check_run(cfg)
    return cfg


def step_of(cfg):
    return plan_step(cfg, LAYOUT, prompt_lengths(cfg))


@pytest.mark.starts_processes
def test_the_command_plans_64_devices_in_one_process_without_weights(argv):
    done = subprocess.run(
        [sys.executable, "-m", "mcore_rl.cli", "plan", *argv, "rollout.max_num_seqs=32"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert "has no tokenizer" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "placement   64 processes on 8 nodes: tp 4 x cp 1 x dp 8 x pp 2; experts etp 1 x ep 8 x "
        "dp 4 x pp 2; 64 engines of 1"
    )
    places = [line.split() for line in lines[2:66]]
    assert places[37] == ["4", "37", "1", "0", "1", "1", "5", "0", "0", "37"]
    text = done.stdout
    assert "64 prompts x 4 samples, 4 updates of 16 prompts" in text
    assert "30,532,122,624 parameters in bfloat16" in text
    assert "rollout.max_num_seqs=32" in text
    assert "of 80 GiB" in text


def test_a_device_that_is_large_enough_fits(argv, capsys):
    write_plan(config(argv))
    assert "does not fit" in capsys.readouterr().out  # an engine holds the whole model
    write_plan(config(argv, "trainer.device_memory_gib=200"))
    out = capsys.readouterr().out
    assert "  fits: " in out
    assert "of 200 GiB" in out


def test_the_step_has_the_lengths_of_the_data_and_of_the_fake_engine(argv):
    cfg = config(argv)
    step = step_of(cfg)
    assert sorted(step.prompt_tokens) == list(range(1, NUM_ROWS + 1))  # 4 characters each
    assert len(step.response_tokens) == 4 * NUM_ROWS
    assert max(step.response_tokens) <= 512
    mean = sum(step.response_tokens) / len(step.response_tokens)
    assert mean == pytest.approx(256, abs=40)  # 4 standard deviations of 256 uniform draws
    assert len(step.micro_batches) == 4
    assert step.largest_micro_batch <= 2048
    assert step.metrics["batch/tokens"].value == (
        4 * sum(step.prompt_tokens) + sum(step.response_tokens)
    )
    assert step_of(cfg) == step


def test_prompts_are_cut_to_the_limit_and_messages_counted(argv, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "y" * 8000}] * 2} for _ in range(64)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert set(step_of(config(argv)).prompt_tokens) == {1024}
    long = config(argv, "data.max_prompt_length=8000", "actor.ppo_max_token_len_per_gpu=9000")
    assert set(step_of(long).prompt_tokens) == {4000}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.train_batch_size=128"], "data.train_batch_size=128"),
        (["actor.megatron.expert_model_parallel_size=3"], "expert 3"),
        (
            [
                "actor.megatron.tensor_model_parallel_size=1",
                "actor.megatron.pipeline_model_parallel_size=64",
                "actor.megatron.expert_model_parallel_size=1",
            ],
            "pipeline_model_parallel_size=64",
        ),
        (
            ["actor.megatron.override_transformer_config.num_layers_in_first_pipeline_stage=20"],
            "num_layers_in_first_pipeline_stage",
        ),
        (
            ["actor.megatron.override_transformer_config.layernorm_epsilon=1e-3"],
            "layernorm_epsilon=0.001 would train another model than that of config.json",
        ),
        (
            ["actor.megatron.override_transformer_config.moe_router_topk=2"],
            "moe_router_topk=2 would train another model",
        ),
    ],
)
def test_what_a_run_would_refuse_is_refused(argv, overrides, named):
    with pytest.raises(UserError, match=named):
        write_plan(config(argv, *overrides))


def test_an_option_of_the_dry_run_is_refused_without_it(argv):
    line = parse_command_line("train", "", [*argv, "trainer.device_memory_gib=40"])
    with pytest.raises(UserError, match=r"trainer\.device_memory_gib"):
        compose_config(RunConfig, line)


def test_every_rank_has_a_place_of_its_own_on_both_kinds_of_axes():
    layout = Layout(tp=2, pp=3, cp=2, ep=4, etp=1, dp=4)
    places = colocated(layout, layout.world_size, None).places
    dense = {(p.tp, p.cp, p.dp, p.pp) for p in places}
    experts = {(p.etp, p.ep, p.expert_dp, p.pp) for p in places}
    assert len(dense) == len(experts) == len(places) == 48
    assert expert_dp_size(layout) == 4
    assert max(p.expert_dp for p in places) == 3


def test_virtual_stages_are_dealt_out_in_turn():
    assert stage_layers(8, Layout(pp=2, vpp=2)) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert stage_layers(5, Layout(pp=2)) == [(0, 1, 2), (3, 4)]


def test_state_is_cut_over_the_ranks_that_hold_copies():
    stage = StageParameters(layers=(0,), dense=800, experts=640, frozen=10)
    layout = Layout(tp=4, pp=2, ep=8, dp=8)  # an expert has 4 copies
    sharded = state_memory(stage, layout, dtype="bfloat16", use_distributed_optimizer=True)
    assert sharded == (2 * 1450, 4 * 1440, 12 * 100 + 12 * 160)
    whole = state_memory(stage, layout, dtype="float32", use_distributed_optimizer=False)
    assert whole == (4 * 1450, 4 * 1440, 8 * 1440)


def test_sizes_of_a_known_model():
    arch = model_family(QWEN3_30B_A3B).transformer_kwargs(QWEN3_30B_A3B)
    assert model_size(QWEN3_30B_A3B) == 30_532_122_624
    assert kv_bytes_per_token(arch, "bfloat16", 1) == 2 * 48 * 4 * 128 * 2
    assert kv_bytes_per_token(arch, "bfloat16", 2) == 48 * 4 * 128 * 2
    assert kv_bytes_per_token(arch, "bfloat16", 8) == 2 * 48 * 128 * 2  # a head at least


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # The size of the published weights in bfloat16, over two bytes.
        (QWEN3_30B_A3B, 30_532_122_624),
        (QWEN3_235B_A22B, 235_093_634_560),
        # 671B in the report (arXiv:2412.19437), without the layer for multi-token prediction; the
        # 58 x 256 biases of its routers are buffers in transformers.
        (DEEPSEEK_V3, 671_026_404_352 + 58 * 256),
    ],
)
def test_parameters_are_those_of_the_published_model_in_any_layout(config, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    tensors = [*model.parameters(), *biases]
    assert sum(tensor.numel() for tensor in tensors) == parameters
    assert model_size(config) == parameters
    counts = ParameterCounts(config)
    for pp, ep in ((1, 1), (4, 1), (4, 8)):
        layout = Layout(pp=pp, ep=ep, dp=ep)
        stages = counts.stages(layout)
        assert sum(s.dense + s.frozen + s.experts * ep for s in stages) == parameters


def test_activations_follow_the_schedule_and_recomputation():
    arch = model_family(QWEN3_30B_A3B).transformer_kwargs(QWEN3_30B_A3B)

    def memory(stage=0, recomputes=False, num_micro_batches=8, **sizes):
        layout = Layout(**sizes)
        stages = [
            StageParameters(layers=layers, dense=0, experts=0, frozen=0)
            for layers in stage_layers(48, layout)
        ]
        return activation_memory(
            arch,
            layout,
            stages,
            stage,
            tokens=1000,
            num_micro_batches=num_micro_batches,
            dtype="bfloat16",
            sequence_parallel=True,
            recomputes_layers=recomputes,
        )

    one = memory()
    assert memory(pp=4) == one  # 4 micro-batches of a quarter of the layers
    assert memory(pp=4, stage=3) == one // 4
    assert memory(pp=4, num_micro_batches=2) == one // 2
    assert memory(pp=4, vpp=2) == pytest.approx(one * (1 + 3 / 8))  # 1 + (pp - 1) / (pp vpp)
    assert memory(tp=2) == pytest.approx(one / 2, rel=1e-6)
    by_layer = 48 * 1000 * 2048 * 2  # inputs, and one layer
    assert memory(recomputes=True) == by_layer + one // 48


def test_a_copy_of_the_first_model_counts_where_a_kl_needs_it(argv, capsys):
    write_plan(config(argv))
    without = column(capsys.readouterr().out, "reference")
    write_plan(config(argv, "actor.use_kl_loss=true"))
    assert without == 0 < column(capsys.readouterr().out, "reference")


def test_a_critic_counts_as_a_model_without_output_layer(argv, capsys):
    write_plan(config(argv, "algorithm.adv_estimator=gae"))
    out = capsys.readouterr().out
    actor = sum(column(out, name) for name in ("weights", "gradients", "optimizer"))
    assert column(out, "critic") == pytest.approx(actor, abs=0.02)  # the first stage has none


STAGE = StageMemory(
    actor={Part.PARAM: 1, Part.GRAD: 2, Part.OPTIMIZER: 4, Part.REFERENCE: 8},
    critic={Part.PARAM: 16, Part.GRAD: 32, Part.OPTIMIZER: 64},
    activations=1000,
    logits=2000,
    forward=4000,
    export=10_000,
    save=20_000,
    save_critic=40_000,
)
TRAINED = frozenset({Part.PARAM, Part.GRAD, Part.OPTIMIZER})


def by_phase(offloads, sleep_level):
    """Return (all on the device, in host memory) by phase."""
    engine = EngineMemory(weights=100_000, kv_cache=200_000, sleep_level=sleep_level)
    moments = fullest_moments(list(Phase), [STAGE], engine, offloads)
    return {moment.phase: (moment.total, moment.host) for moment in moments}


def test_each_phase_holds_what_it_needs_and_its_own():
    everything = Offloads(actor=TRAINED | {Part.REFERENCE}, critic=TRAINED)
    assert by_phase(everything, sleep_level=2) == {
        Phase.GENERATE: (300_000, 127),
        Phase.LOGPROBS: (6001, 126),
        Phase.REF_LOGPROBS: (6008, 119),
        Phase.VALUES: (4016, 111),
        Phase.TRAIN: (3007, 120),
        Phase.REVIVE: (310_001, 126),
        Phase.TRAIN_CRITIC: (1112, 15),
        Phase.SYNC: (110_001, 126),
        Phase.SAVE: (5, 122),
        Phase.SAVE_CRITIC: (80, 47),
        Phase.EXPORT: (10_001, 126),
    }


def test_weights_of_an_engine_that_sleeps_lightly_are_in_host_memory():
    found = by_phase(Offloads(), sleep_level=1)
    assert found[Phase.TRAIN] == (3127, 100_000)
    assert found[Phase.SYNC] == (110_127, 0)
    assert found[Phase.GENERATE] == (300_127, 0)


def test_without_offload_and_sleep_everything_stays_beside_what_a_phase_needs():
    found = by_phase(Offloads(), sleep_level=0)
    assert found[Phase.GENERATE] == (300_127, 0)
    assert found[Phase.TRAIN] == (303_127, 0)
    assert found[Phase.SAVE_CRITIC] == (300_127, 0)


def test_a_phase_is_planned_for_on_the_stage_that_needs_most():
    larger = replace(STAGE, export=STAGE.export + 1, activations=0)
    engine = EngineMemory(weights=0, kv_cache=0, sleep_level=2)
    stages, gone = [STAGE, larger], Offloads(actor=TRAINED)
    moments = fullest_moments([Phase.TRAIN, Phase.SYNC], stages, engine, gone)
    assert [moment.own for moment in moments] == [3000, 10_001]
    assert most_host_memory([Phase.TRAIN, Phase.SYNC], stages, engine, gone) == 6


def test_a_run_has_the_phases_of_its_models(argv):
    plain = [Phase.GENERATE, Phase.LOGPROBS, Phase.TRAIN, Phase.SYNC, Phase.SAVE]
    assert phases_of(config(argv, "trainer.export_hf_model=false")) == plain
    every = config(argv, "algorithm.adv_estimator=gae", "actor.use_kl_loss=true")
    assert phases_of(every) == [phase for phase in Phase if phase is not Phase.REVIVE]
    restarts = config(argv, "rollout.host=process", "rollout.max_engine_restarts=1")
    assert Phase.REVIVE in phases_of(restarts)


def test_a_checkpoint_copies_each_rank_s_part_of_weights_masters_and_moments():
    stage = StageParameters(layers=(0,), dense=80_000_000, experts=640_000_000, frozen=1600)
    layout = Layout(tp=4, pp=2, ep=8, dp=8)  # an expert has 4 copies
    whole = {"use_distributed_optimizer": True, "saves_frozen": True}
    assert save_memory(stage, layout, dtype="bfloat16", **whole) == (
        14 * (10_000_000 + 160_000_000) + 2 * 200
    )
    alone = {"use_distributed_optimizer": False, "saves_frozen": False}
    # float32 weights are their own masters, which the distributed optimizer saves nevertheless.
    assert save_memory(stage, layout, dtype="float32", **alone) == 12 * 170_000_000
    alone["use_distributed_optimizer"] = True
    assert save_memory(stage, layout, dtype="float32", **alone) == 16 * 170_000_000


def test_an_export_has_three_buckets_beside_the_layer_that_an_engine_loads():
    entries = model_family(QWEN3_30B_A3B).entries(QWEN3_30B_A3B)
    experts = 128 * 3 * 2048 * 768
    attention = 2048 * 128 * (32 + 4 + 4 + 32) + 2 * 128 + 2 * 2048
    layer = 2 * (experts + attention + 128 * 2048)
    vocabulary = 2 * 151936 * 2048  # a tensor of its own, larger than the first bucket
    assert export_memory(entries, "bfloat16", 512 << 20) == 3 * vocabulary + layer
    assert export_memory(entries, "bfloat16", 1 << 30) == 3 * (1 << 30) + layer


def test_a_plan_shows_each_phase_with_and_without(argv, capsys):
    offloads = [f"actor.megatron.{part}_offload=true" for part in ("grad", "optimizer")]
    write_plan(config(argv, *offloads, "rollout.sleep_level=2", "trainer.device_memory_gib=81"))
    out = capsys.readouterr().out
    assert "in host memory while not needed: actor.grad, actor.optimizer; rollout.sle" in out
    rows = {row.split()[0]: row.split()[1:] for row in out.splitlines() if row.startswith("  ")}
    header = rows.pop("phase")
    assert header == ["actor", "reference", "critic", "its", "own", "engine", "all", "resident"]
    weights, gradients, optimizer = (
        column(out, name) for name in ("weights", "gradients", "optimizer")
    )
    assert float(rows["generate"][0]) == weights
    assert float(rows["train"][0]) == pytest.approx(weights + gradients + optimizer, abs=0.02)
    for row in ("train", "save", "export"):
        assert float(rows[row][4]) == 0  # the engine
        assert float(rows[row][6]) > float(rows[row][5])
    (host,) = re.findall(r"host memory: ([\d.]+) GiB per node", out)
    # Eight devices of numbers with two decimals; the other stage has a norm more.
    assert float(host) == pytest.approx(8 * (gradients + optimizer), abs=0.2)
    (copies,) = re.findall(r"checkpoint: ([\d.]+) GiB of host memory per node until", out)
    assert float(copies) == pytest.approx(8 * optimizer * 14 / 12, abs=0.2)  # and weights


def column(out, name):
    """Return the number under `name` of the first stage."""
    lines = out.splitlines()
    number = next(i for i, line in enumerate(lines) if line.startswith("  stage "))
    names, cells = lines[number].replace("kv cache", "kv_cache").split(), lines[number + 1].split()
    return float(cells[names.index(name)])


def test_engines_on_devices_of_their_own_take_no_room_of_the_trainers(argv, capsys):
    write_plan(config(argv, "rollout.host=process"))
    together = capsys.readouterr().out
    assert "engines of 1 in processes of their own\n" in together
    own = ["rollout.host=process", "rollout.nnodes=2", "rollout.n_gpus_per_node=8"]
    write_plan(config(argv, *own, "rollout.tensor_model_parallel_size=2"))
    apart = capsys.readouterr().out
    assert "; 8 engines of 2 in processes of their own on 16 devices of their own\n" in apart
    assert of_engines(together) > 0
    assert of_engines(apart) == 0


def of_engines(out):
    """Return the most GiB that an engine has on the fullest device in any phase."""
    names = [str(phase) for phase in Phase]
    cells = [line.split() for line in out.splitlines()]
    return max(float(row[-3]) for row in cells if row and row[0] in names and len(row) == 8)
