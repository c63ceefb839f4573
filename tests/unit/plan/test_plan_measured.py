"""A run's end: what was measured stands beside what the plan counts on such a device."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mcore_rl.cluster.memory import Measured
from mcore_rl.cluster.phases import Phase
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.observability.report.page import report_data
from mcore_rl.observability.report.run import RunFolder
from mcore_rl.plan.estimate import GIB
from mcore_rl.plan.measured import HELD, memory_rows, write_memory
from mcore_rl.plan.memory import StageMemory
from mcore_rl.plan.moments import EngineMemory, Moment
from mcore_rl.rollout.base import CPU_KV_CACHE_BYTES, RolloutConfig
from mcore_rl.types import Part

STAGE = StageMemory(
    actor={Part.PARAM: GIB, Part.GRAD: 2 * GIB, Part.OPTIMIZER: 4 * GIB},
    critic={Part.PARAM: 8 * GIB},
    activations=16 * GIB,
    logits=32 * GIB,
    forward=64 * GIB,
    export=128 * GIB,
    save=256 * GIB,
    save_critic=1024 * GIB,
)
SMALLER = StageMemory(
    actor={Part.PARAM: GIB},
    critic={},
    activations=0,
    logits=0,
    forward=0,
    export=0,
    save=0,
    save_critic=0,
)


def moment(phase, **sizes):
    nothing = dict.fromkeys(("actor", "reference", "critic", "own", "engine", "host"), 0)
    return Moment(phase=phase, **(nothing | sizes))


PLANNED: Any = SimpleNamespace(
    memory=[SMALLER, STAGE],
    engine=EngineMemory(weights=512 * GIB, kv_cache=7, sleep_level=2),
    moments=[
        moment(Phase.TRAIN, actor=7 * GIB, own=48 * GIB, host=8 * GIB),
        moment(Phase.SAVE, actor=5 * GIB, engine=GIB, host=10 * GIB),
    ],
)
STATE = 1 + 2 + 4 + 8


def rows(is_of_host, **rollout):
    peaks = {Phase.TRAIN: 60 * GIB, Phase.SAVE: 270 * GIB, Phase.SAVE_CRITIC: 1290 * GIB}
    found = Measured(peaks=peaks, held=16 * GIB, is_of_host=is_of_host)
    cfg: Any = SimpleNamespace(rollout=RolloutConfig(**rollout))
    return memory_rows(cfg, PLANNED, found)


def test_a_resident_set_has_all_of_the_fullest_stage_wherever_it_is():
    assert rows(True, host="process") == {
        "train": (STATE + 48, 60),
        "save": (STATE + 256, 270),
        "save_critic": (STATE + 256 + 1024, 1290),
        HELD: (STATE, 16),
    }


def test_an_engine_in_the_worker_counts_on_cpu_asleep_or_not():
    cache = CPU_KV_CACHE_BYTES / GIB
    assert rows(True)[HELD] == (STATE + 512 + cache, 16)
    assert rows(True, kv_cache_memory_bytes=2 * GIB)[HELD] == (STATE + 512 + 2, 16)
    assert rows(True, name="fake")[HELD] == (STATE, 16)  # it has no model


def test_a_device_has_what_the_plan_says_of_each_phase():
    """The copies that a checkpoint is written from are in host memory."""
    assert rows(False) == {"train": (55, 60), "save": (6, 270), HELD: (6, 16)}


def test_a_finished_run_does_not_fail_for_a_plan_that_does_not_know_its_options(tmp_path, caplog):
    uneven = "actor.megatron.override_transformer_config.num_layers_in_last_pipeline_stage=2"
    stages = ["actor.megatron.pipeline_model_parallel_size=2", "trainer.n_gpus_per_node=2"]
    argv = ["model.path=m", "data.train_files=d", *stages, f"+{uneven}"]
    cfg = compose_config(RunConfig, parse_command_line("train", "", argv))
    write_memory(cfg, [3], Measured(peaks={}, held=1, is_of_host=True), tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("there is no plan to compare the measured memory with: actor.megatron.")
    assert list(tmp_path.iterdir()) == []


def reported_memory(run_dir):
    (run,) = report_data([RunFolder.read(run_dir)])["runs"]
    return run["memory"]


def test_the_report_shows_the_rows_of_the_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward/mean": 0.5}) + "\n")
    assert reported_memory(tmp_path) is None
    row = {"phase": "train", "estimated_gib": 1.5, "measured_gib": 2.0}
    record = {"what": "a device", "rows": [row]}
    (tmp_path / "memory.json").write_text(json.dumps(record))
    shown = {"what": "a device", "rows": [["train", "1.50", "2.00", "0.750"]]}
    assert reported_memory(tmp_path) == shown


@pytest.mark.parametrize("text", ["", "{", '{"rows": 3}', '{"what": "x", "rows": [{}]}'])
def test_a_report_goes_without_a_file_of_another_form(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward/mean": 0.5}) + "\n")
    (tmp_path / "memory.json").write_text(text)
    assert reported_memory(tmp_path) is None
