"""Models by their names on the hub: from the cache, at the commit that a run began with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import constants

from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, SftRunConfig, with_fetched_models
from mcore_rl.errors import UserError
from mcore_rl.megatron.config import MegatronConfig, OptimConfig
from mcore_rl.model_files import fetch_model, find_model, published_name
from mcore_rl.rollout.base import EngineSpec, RolloutConfig
from mcore_rl.workers.spec import ActorSpec, ModelSpec, WorkerSpec
from tests.hub_cache import COMMIT, put_model

OTHER = "f" * 40
NAME = "Qwen/Qwen2.5-7B"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def model(tmp_path):
    """A folder with the names of a model's files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_a_name_of_the_hub_is_found_in_the_cache_by_branch_tag_and_commit(cache, model):
    snapshot = put_model(cache, NAME, model)
    tagged = put_model(cache, NAME, model, commit=OTHER, ref="v1.0")
    assert find_model(NAME) == snapshot
    assert find_model(f"{NAME}@main") == snapshot
    assert find_model(f"{NAME}@{COMMIT}") == snapshot
    assert find_model(f"{NAME}@v1.0") == find_model(f"{NAME}@{OTHER}") == tagged


def test_an_adapter_names_its_base_as_others_find_it(cache, model):
    assert published_name(put_model(cache, "Qwen/Qwen2.5--7B", model)) == "Qwen/Qwen2.5--7B"
    assert published_name(model) == str(model)


def test_a_folder_of_that_name_comes_first(cache, model, tmp_path):
    put_model(cache, NAME, model)
    shutil.copytree(model, tmp_path / NAME)
    assert (tmp_path / find_model(NAME)).samefile(tmp_path / NAME)
    assert fetch_model(NAME, "model.path") == NAME


@pytest.mark.parametrize("name", [NAME, f"{NAME}@v2", "outputs/sft"])
def test_what_is_neither_folder_nor_in_the_cache_is_one_line_with_the_way_out(cache, name):
    with pytest.raises(UserError) as caught:
        fetch_model(name, "model.path")
    assert str(caught.value) == (
        f"model.path={name!r} is no folder here, and the cache of the Hugging Face hub has no such "
        "model. Check the name, or set HF_HUB_OFFLINE=0 to have it downloaded."
    )


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({"tokenizer.json": {}}, "config.json"),
        ({"config.json": {}}, "model.safetensors"),
        (
            {
                "config.json": {},
                "model.safetensors.index.json": {"weight_map": {"a": "model-1.safetensors"}},
            },
            "model-1.safetensors",
        ),
    ],
)
def test_a_cache_with_a_part_of_the_model_names_what_is_missing(cache, tmp_path, files, missing):
    part = tmp_path / "part"
    part.mkdir()
    for name, content in files.items():
        (part / name).write_text(json.dumps(content))
    snapshot = put_model(cache, NAME, part)
    with pytest.raises(UserError, match=rf"only a part of it, without {missing}\. Set HF_HUB_OFFL"):
        find_model(NAME)
    if "config.json" in files:
        assert find_model(NAME, weights=False) == snapshot  # enough for a plan


def compose(*argv):
    return compose_config(RunConfig, parse_command_line("train", "", argv))


def test_a_run_keeps_the_commit_that_it_began_with(cache, model):
    put_model(cache, NAME, model)
    cfg = with_fetched_models(
        compose(f"model.path={NAME}", f"critic.model.path={NAME}", "algorithm.adv_estimator=gae")
    )
    put_model(cache, NAME, model, commit=OTHER)  # the branch has moved on
    assert cfg.model.path == cfg.critic.model.path == f"{NAME}@{COMMIT}"
    assert cfg.model.folder == cfg.critic.model.folder == str(find_model(f"{NAME}@{COMMIT}"))
    assert find_model(NAME).name == OTHER
    assert with_fetched_models(cfg) == cfg


def test_fine_tuning_names_its_model_so_too(cache, model):
    put_model(cache, NAME, model)
    line = parse_command_line("sft", "", [f"model.path={NAME}"])
    assert with_fetched_models(compose_config(SftRunConfig, line)).model.path == f"{NAME}@{COMMIT}"


def test_a_folder_stays_as_it_was_named_and_a_critic_s_name_is_refused_by_its_key(cache, model):
    cfg = compose(f"model.path={model}")
    assert with_fetched_models(cfg) == cfg
    cfg = compose(f"model.path={model}", "critic.model.path=org/critic")
    with pytest.raises(UserError, match=r"^critic\.model\.path='org/critic' is no folder here"):
        with_fetched_models(cfg)


def test_a_worker_finds_the_commit_in_the_cache_of_its_own_machine(cache, model):
    snapshot = put_model(cache, NAME, model)
    shared = {
        "model_path": f"{NAME}@{COMMIT}",
        "megatron": MegatronConfig(),
        "optim": OptimConfig(),
        "grad_clip": 1.0,
        "total_steps": 1,
    }
    actor = ActorSpec(temperature=1.0, with_reference=False, **shared)
    engine = EngineSpec(
        model_path=f"{NAME}@{COMMIT}",
        dtype="float32",
        max_model_len=8,
        stop_token_ids=[],
        config=RolloutConfig(),
        run_folder="unread",
    )
    placement: Any = None
    spec = WorkerSpec(
        placement=placement, actor=actor, engine=engine, critic=ModelSpec(**shared)
    ).on_this_machine()
    assert spec.critic is not None
    assert spec.engine is not None
    paths = {spec.actor.model_path, spec.engine.model_path, spec.critic.model_path}
    assert paths == {str(snapshot)}
    elsewhere = replace(spec, engine=None, critic=None, actor=replace(actor, model_path="a/b@c"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=0"):
        elsewhere.on_this_machine()
