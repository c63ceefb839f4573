"""Suggestions are what a search of every configuration by the plan itself finds."""

from __future__ import annotations

import itertools
import json

import pytest
from transformers import Qwen3MoeConfig

from mcore_rl.cli import COMMANDS
from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.errors import UserError
from mcore_rl.models.layout import check_engine_layout, check_layout
from mcore_rl.models.spec import load_hf_config
from mcore_rl.plan.__main__ import main
from mcore_rl.plan.candidates import with_values
from mcore_rl.plan.estimate import ModelCounts, estimate
from mcore_rl.plan.step_time import Speeds
from mcore_rl.plan.suggest import suggest, work_of
from mcore_rl.plan.suggest_report import suggestion_lines

MODEL = Qwen3MoeConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,  # pyright: ignore[reportCallIssue]  # one of the further keys
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
PROMPTS = [100] * 64
AXES = [
    f"actor.megatron.{axis}_parallel_size"
    for axis in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
]


@pytest.fixture
def argv(tmp_path):
    """Return the arguments of a run on four small devices."""
    MODEL.save_pretrained(tmp_path)
    row = {"prompt": "x" * 400, "ground_truth": "1", "data_source": "math"}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(row)] * 64))
    return [
        *["--config-name", "gmpo", f"model.path={tmp_path}"],
        f"data.train_files={tmp_path / 'train.jsonl'}",
        *["data.train_batch_size=64", "actor.ppo_mini_batch_size=32", "rollout.n=4"],
        *["data.max_prompt_length=128", "data.max_response_length=896"],
        *["trainer.n_gpus_per_node=4", "trainer.device_memory_gib=3"],
        "rollout.update_weights_bucket_mib=64",  # the default would be half of a device
    ]


def config(argv, *overrides):
    line = parse_command_line("train", "", [*argv, "trainer.dry_run=true", *overrides])
    return compose_config(RunConfig, line), [option.key for option in line.overrides]


def model(argv):
    """Return what counts of the models are made of."""
    cfg, _ = config(argv)
    return cfg, load_hf_config(cfg.model.folder)


def suggested(argv, *overrides):
    cfg, fixed = config(argv, *overrides)
    counts = ModelCounts(cfg, load_hf_config(cfg.model.folder))
    return suggest(cfg, counts, work_of(cfg, PROMPTS), Speeds(), fixed)


def key(one):
    """Return the sizes of the axes of a suggestion on shared devices."""
    layout = one.layout
    return layout.tp, layout.pp, layout.cp, layout.ep, layout.etp


def test_the_layouts_that_fit_are_those_of_a_search_by_the_plan_itself(argv):
    """Everything but the layout is set, so that each has one plan."""
    chosen = [
        *["rollout.host=in_process", "rollout.tensor_model_parallel_size=2"],
        *["rollout.gpu_memory_utilization=0.5", "rollout.sleep_level=2"],
        *[f"actor.megatron.{part}_offload=false" for part in ("param", "grad", "optimizer")],
        *["actor.ppo_max_token_len_per_gpu=1024"],
        "actor.megatron.override_transformer_config.recompute_granularity=full",
        "actor.megatron.override_transformer_config.recompute_method=uniform",
        "actor.megatron.override_transformer_config.recompute_num_layers=1",
    ]
    found = suggested(argv, *chosen)
    run, _ = config(argv, *chosen)
    hf_config = load_hf_config(run.model.folder)
    work, counts = work_of(run, PROMPTS), ModelCounts(run, hf_config)
    fitting = {}
    for sizes in itertools.product((1, 2, 4), repeat=5):
        if sizes[4] not in (1, sizes[0]):
            continue
        try:
            cfg = with_values(run, dict(zip(AXES, sizes, strict=True)))
            layout = train_layout(cfg.actor.megatron, 4)
            is_cut = cfg.actor.megatron.uses_sequence_parallel
            check_layout(hf_config, layout, sequence_parallel=is_cut)
            check_run(cfg)
        except UserError:
            continue
        tokens = work.tokens / work.updates / layout.dp
        planned = estimate(
            cfg,
            counts,
            layout,
            largest_micro_batch=work.longest,
            num_micro_batches=-int(-tokens // (1024 * layout.cp)),
        )
        if planned.fits:
            fitting[sizes] = planned
    assert {key(one) for one in found.fitting} == set(fitting)
    assert 0 < len(fitting) < len(found.fitting) + len(found.impossible)
    for one in found.fitting:
        assert one.estimate.moments == fitting[key(one)].moments


def test_every_suggestion_fits_composes_as_it_is_printed_and_the_fastest_comes_first(argv):
    cfg, fixed = config(argv)
    counts = ModelCounts(cfg, load_hf_config(cfg.model.folder))
    work = work_of(cfg, PROMPTS)
    found = suggest(cfg, counts, work, Speeds(), fixed)
    times = [one.step_s for one in found.fitting]
    assert times == sorted(times)
    assert {one.cfg.rollout.nnodes for one in found.fitting} == {0, 1}  # beside, and apart
    lines = list(suggestion_lines(cfg, counts, work, Speeds(), found, 1000))
    printed = [
        line.split()[1:] for line in lines if line.strip()[:1].isdigit() and "=" in line.split()[1]
    ]
    assert len(printed) == len(found.fitting)
    pairs = list(zip(found.fitting, printed, strict=True))
    is_apart = [one.cfg.rollout.nnodes > 0 for one, _ in pairs]
    for one, assignments in [pairs[0], pairs[is_apart.index(True)], pairs[-1]]:
        again, _ = config(argv, *assignments)
        assert again == one.cfg
    for one in found.fitting:
        check_run(one.cfg)
        check_engine_layout(counts.hf_config, one.cfg.rollout.tensor_model_parallel_size, "")
        assert one.estimate.fits
        assert sum(one.seconds.values()) == one.step_s


def test_what_a_user_sets_stays(argv):
    tp = "actor.megatron.tensor_model_parallel_size=2"
    found = suggested(argv, tp, "rollout.sleep_level=2", "rollout.host=in_process")
    assert found.fitting
    for one in found.fitting:
        assert one.layout.tp == 2
        assert one.cfg.rollout.sleep_level == 2
        assert one.cfg.rollout.host == "in_process"


def test_what_cannot_be_says_why(argv):
    together = "rollout.host=in_process"
    found = suggested(argv, "trainer.device_memory_gib=0.1", together)
    assert found.fitting == []
    weights = f"{ModelCounts(*model(argv)).num_parameters * 2 / 4 / 2**30:.1f} GiB of weights"
    why = f"no engine holds {weights} a device and the longest sample"
    assert set(found.impossible.values()) == {why}
    found = suggested(argv, "trainer.device_memory_gib=1", together)
    assert found.impossible["tp 1 pp 1 cp 1 ep 1 etp 1"].startswith("train needs ")
    found = suggested(argv)
    name = "tp 3 pp 1 cp 1 ep 1 etp 1, engines on 1 devices of their own"
    assert "tensor_model_parallel_size=3 does not divide" in found.impossible[name]


def test_more_memory_never_makes_a_step_slower(argv):
    small, large = suggested(argv), suggested(argv, "trainer.device_memory_gib=80")
    assert large.fitting[0].step_s <= small.fitting[0].step_s
    assert len(large.fitting) >= len(small.fitting)


def test_the_command_prints_the_table_and_refuses_what_is_no_speed(argv, capsys):
    assert COMMANDS["plan"] == ("mcore_rl.plan.__main__",)
    main(["--suggest", *argv, "--top", "2", "--tflops", "100"])
    out = capsys.readouterr().out
    assert "1 nodes of 4 devices of 3 GiB" in out
    assert "--tflops 100, --memory-tb-s 3.35" in out
    assert "impossible:" in out
    with pytest.raises(SystemExit) as ended:
        main(["--suggest", *argv, "--tflops", "0"])
    assert ended.value.code == 2
    assert "--tflops=0.0 must be > 0" in capsys.readouterr().err
