"""The `rollout` section refuses what would make engine and trainer disagree."""

from __future__ import annotations

import pytest

from mcore_rl.errors import UserError
from mcore_rl.rollout.base import ENGINES, EngineKind, RolloutConfig, ValKwargsConfig
from mcore_rl.rollout.fake_engine import FakeEngine
from mcore_rl.weight_sync.base import Distance

SERVER = {"host": "server", "server_urls": ["http://a:1"]}


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("name", "vlm", r"is not one of .*vllm\. Did you mean 'vllm'\?"),
        ("n", 0, "must be at least 1"),
        ("temperature", 0.0, "must be > 0"),
        ("temperature", -1.0, "must be > 0"),
        ("top_p", 0.9, "log-probabilities differ"),
        ("top_k", 50, "log-probabilities differ"),
        ("stop", ["a", ""], "holds an empty text"),
        ("dtype", "float16", "is not one of float32, bfloat16"),
        ("dtype", "", "is not one of float32, bfloat16"),
        ("max_num_seqs", 0, "must be at least 1"),
        ("max_num_batched_tokens", 0, "must be at least 1"),
        ("max_model_len", -1, "must be at least 1"),
        ("kv_cache_memory_bytes", 0, "must be at least 1"),
        ("logprob_tolerance", 0.0, "must be > 0"),
        ("gpu_memory_utilization", 0.0, r"must lie in \(0, 1\]"),
        ("gpu_memory_utilization", 1.1, r"must lie in \(0, 1\]"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, rule):
    with pytest.raises(UserError, match=rf"^rollout\.{field}=.*{rule}"):
        RolloutConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", 0)],
)
def test_validation_sampling_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^rollout\.val_kwargs\.{field}="):
        ValKwargsConfig(do_sample=True, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "rest"),
    [
        ("n", 32, r"would draw one greedy answer 32 times\. Set .*\.do_sample=true\."),
        ("temperature", 0.6, r"is not read with .*\.do_sample=false\. Leave it at 1\.0\."),
        ("top_p", 0.7, r"is not read with .*\.do_sample=false\. Leave it at 1\.0\."),
        ("top_k", 20, r"is not read with .*\.do_sample=false\. Leave it at -1\."),
    ],
)
def test_a_greedy_validation_refuses_what_sampling_reads(field, value, rest):
    with pytest.raises(UserError, match=rf"^rollout\.val_kwargs\.{field}={value} {rest}"):
        ValKwargsConfig(**{field: value})


def test_a_greedy_validation_may_have_temperature_0():
    assert ValKwargsConfig(temperature=0.0).temperature == 0


def test_validation_may_sample_from_a_part_of_the_vocabulary():
    val = ValKwargsConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    assert RolloutConfig(val_kwargs=val).val_kwargs == val


def test_an_engine_of_a_plugin_can_be_chosen(monkeypatch):
    monkeypatch.setattr(ENGINES, "_entries", dict(ENGINES._entries))
    with pytest.raises(UserError):
        RolloutConfig(name="of_a_plugin")
    ENGINES.add("of_a_plugin", EngineKind(load=lambda: FakeEngine, has_texts=False))
    assert RolloutConfig(name="of_a_plugin").name == "of_a_plugin"
    with pytest.raises(UserError, match="is not read by an engine without texts"):
        RolloutConfig(name="of_a_plugin", stop=["a"])


def test_an_engine_without_texts_refuses_texts_that_end_a_response():
    with pytest.raises(UserError, match=r"^rollout\.stop=\['a'\] is not read by an engine without"):
        RolloutConfig(name="fake", stop=["a"])
    assert RolloutConfig(stop=["a"]).stop == ["a"]


def test_an_engine_that_would_run_a_model_s_code_is_refused():
    RolloutConfig(engine_kwargs={"trust_remote_code": False})
    with pytest.raises(
        UserError, match=r"^rollout\.engine_kwargs\.trust_remote_code=True would run"
    ):
        RolloutConfig(engine_kwargs={"trust_remote_code": True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "procss"}, r"rollout\.host='procss' is not one of .* Did you mean 'process'\?"),
        ({"nnodes": 1}, r"rollout\.nnodes=1 is not read with rollout\.host=in_process"),
        ({"n_gpus_per_node": 2}, r"rollout\.n_gpus_per_node=2 is not read with rollout\.host=in_p"),
        ({"max_engine_restarts": 1}, r"rollout\.max_engine_restarts=1 is not read with rollout\.h"),
        ({"host": "process", "nnodes": -1}, r"rollout\.nnodes=-1 must be at least 0"),
        ({"host": "server"}, r"rollout\.server_urls=\[\] is not set"),
        (
            {"server_urls": ["http://a:1"]},
            r"rollout\.server_urls=.* is not read with",
        ),
        (
            {**SERVER, "server_urls": ["a:1"]},
            r"rollout\.server_urls=.* holds 'a:1', which",
        ),
        (
            {**SERVER, "server_urls": ["http://a"] * 2},
            r"rollout\.server_urls=.* names a",
        ),
        ({**SERVER, "name": "fake"}, r"rollout\.name='fake' is no server"),
        ({**SERVER, "nnodes": 1}, r"rollout\.nnodes=1 is not read with rollout\.host=server"),
        ({**SERVER, "max_engine_restarts": 1}, r"rollout\.max_engine_restarts=1 is not read"),
        (
            {**SERVER, "max_num_seqs": 4},
            r"rollout\.max_num_seqs=4 is not read with",
        ),
        (
            {**SERVER, "sleep_level": 1},
            r"rollout\.sleep_level=1 is not read with",
        ),
        ({**SERVER, "engine_kwargs": {"a": 1}}, r"rollout\.engine_kwargs=.* is not read"),
        ({"host": "process", "nnodes": 1}, r"rollout\.n_gpus_per_node=None is not set"),
        (
            {"host": "process", "n_gpus_per_node": 2},
            r"rollout\.n_gpus_per_node=2 is not read with rollout\.nnodes=0",
        ),
        (
            {"host": "process", "max_engine_restarts": -1},
            r"rollout\.max_engine_restarts=-1 must be at least 0",
        ),
        (
            {"host": "process", "nnodes": 1, "n_gpus_per_node": 2, "sleep_level": 1},
            r"rollout\.sleep_level=1 frees devices that the trainer does not use",
        ),
    ],
)
def test_where_engines_run_refuses_what_is_not_read_or_cannot_be(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        RolloutConfig(**fields)


def test_weights_take_the_way_of_the_host_unless_another_is_named():
    assert RolloutConfig().transport == "direct"
    assert RolloutConfig(host="process").transport == "shared_memory"
    assert RolloutConfig(host="process", weight_transport="disk").transport == "disk"


def test_servers_of_this_machine_are_nearer_than_others():
    here = RolloutConfig(host="server", server_urls=["http://localhost:1", "http://127.0.0.1:2"])
    away = RolloutConfig(host="server", server_urls=["http://localhost:1", "http://10.0.0.2:2"])
    assert (here.distance, away.distance) == (Distance.SAME_MACHINE, Distance.OTHER_MACHINE)
    assert here.transport == away.transport == "disk"
