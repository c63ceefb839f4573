"""Engines say what the trainer says after every sync, wherever they run and however it is cut.

`pytest -m slow tests/e2e/test_e2e_agreement.py -rP` does the whole matrix.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.e2e import commands
from tests.e2e.vllm_servers import VllmServer
from tests.vllm_models import make_model

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

MODELS = {"dense": "qwen3", "moe": "qwen3_moe", "tied": "qwen3_tied", "mla": "deepseek_v3"}
EXPERTS = ("moe", "mla")
TP2 = ("actor.megatron.tensor_model_parallel_size=2",)
PP2 = ("actor.megatron.pipeline_model_parallel_size=2",)
EP2 = ("actor.megatron.expert_model_parallel_size=2",)
LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "tp2pp2": (4, (*TP2, *PP2)),
}
CACHE = "rollout.kv_cache_memory_bytes=33554432"
OWN = "rollout.host=process"
ENGINE_TP2 = "rollout.tensor_model_parallel_size=2"
HOSTS = {
    "in_process": (),
    "process": (OWN,),
    "process, gloo": (OWN, "rollout.weight_transport=gloo"),
    "process, disk": (OWN, "rollout.weight_transport=disk"),
    "in_process, TP2": (ENGINE_TP2,),
    "process, TP2": (OWN, ENGINE_TP2),
    "process, own devices": (OWN, "rollout.nnodes=1", "rollout.n_gpus_per_node=1"),
}
SERVERS = {
    "server": (),
    "server, shared memory": ("rollout.weight_transport=shared_memory",),
}
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Return a function: "moe" -> folder of a tiny checkpoint that vLLM runs."""
    root = tmp_path_factory.mktemp("agreement")

    def folder_of(model: str) -> Path:
        folder = root / model
        if not folder.exists():
            make_model(MODELS[model], 1).save_pretrained(folder)
        return folder

    return folder_of


def check(prepared, folder: Path, work: Path, layout: str, of_engine: tuple[str, ...]) -> None:
    work.mkdir()
    num_processes, of_layout = LAYOUTS[layout]
    done = prepared.run(
        f"model.path={folder}",
        f"trainer.default_local_dir={work}",
        f"trainer.n_gpus_per_node={num_processes}",
        "actor.megatron.dtype=float32",
        "actor.optim.lr=0.01",
        *of_layout,
        *of_engine,
        module="agreement_run",
        environment={
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((work / "agreement.json").read_text())
    a, b, a_again = found["syncs"]
    assert max(of_weights["largest"] for of_weights in (a, b, a_again)) <= TOLERANCE
    assert a_again["said"] == a["said"]
    # B is another model: the same tokens have other log-probabilities by more than rounding.
    assert b["said"] != a["said"]
    first = [of["said"][0][1][0] for of in (a, b)]
    assert a["said"][0][0][0] != b["said"][0][0][0] or abs(first[0] - first[1]) > 10 * TOLERANCE
    (num_loaded,) = set(found["num_loaded"])
    assert num_loaded > 20


@pytest.mark.parametrize(
    ("model", "layout", "host"),
    [
        ("moe", "tp2pp2", "in_process"),
        ("tied", "pp2", "process"),
        ("mla", "ep2", "process, disk"),
        ("dense", "tp2", "process, TP2"),
        ("moe", "ep2", "in_process, TP2"),
    ],
)
def test_engines_agree_with_the_trainer_after_every_sync(
    prepared, folder_of, tmp_path, model, layout, host
):
    check(prepared, folder_of(model), tmp_path / "run", layout, (CACHE, *HOSTS[host]))


def cells() -> list[tuple[str, str, str]]:
    """Return the whole matrix: experts are cut over ranks where there are some; an engine of two
    ranks is cut from an even number of devices."""
    return [
        (model, layout, host)
        for host in HOSTS
        for model in MODELS
        for layout in LAYOUTS
        if (model in EXPERTS or layout != "ep2") and (layout != "one" or "TP2" not in host)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout", "host"), cells())
def test_the_whole_matrix_agrees(prepared, folder_of, tmp_path, model, layout, host):
    check(prepared, folder_of(model), tmp_path / "run", layout, (CACHE, *HOSTS[host]))


@pytest.fixture(scope="module")
def url_of(folder_of, tmp_path_factory):
    """Return a function: "moe" -> the address of a server for that model."""
    servers: dict[str, VllmServer] = {}

    def url_of(model: str) -> str:
        if model not in servers:
            log = tmp_path_factory.mktemp("servers") / model
            servers[model] = VllmServer(folder_of(model), log, max_model_len=256)
            servers[model].wait()
        return servers[model].url

    yield url_of
    for server in servers.values():
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize("host", SERVERS)
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (model, layout)
        for model in MODELS
        for layout in LAYOUTS
        if model in EXPERTS or layout != "ep2"
    ],
)
def test_servers_agree_in_the_whole_matrix(
    prepared, folder_of, url_of, tmp_path, model, layout, host
):
    of_server = ("rollout.host=server", f"rollout.server_urls=[{url_of(model)}]", *SERVERS[host])
    check(prepared, folder_of(model), tmp_path / "run", layout, of_server)
