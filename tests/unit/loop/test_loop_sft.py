"""The supervised loop on fake workers."""

from __future__ import annotations

import json

import pytest

from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import SftRunConfig
from mcore_rl.data.prompts import ItemStream
from mcore_rl.errors import StoppedError
from mcore_rl.loop.inputs import SftInputs
from mcore_rl.loop.sft import train
from mcore_rl.loop.stop import Stop
from mcore_rl.run.folder import open_run_folder
from tests.carriers import make_sequence
from tests.unit.loop.fake_workers import CrashError, FakeWorkers, make_cluster

SEQUENCES = [
    make_sequence(
        token_ids=[1, 2, *[3 + i % 2] * (1 + i % 3), 0],
        loss_mask=[False, False, *[True] * (2 + i % 3)],
    )
    for i in range(7)
]


def run(tmp_path, *overrides, steps=6, folder="run", crash_at=None, ask_at=None):
    argv = ["data.train_batch_size=3", "trainer.logger=[]", "trainer.save_freq=2", *overrides]
    argv.append(f"trainer.default_local_dir={tmp_path / folder}")
    cfg = compose_config(SftRunConfig, parse_command_line("sft", "", argv))
    inputs = SftInputs(sequences=ItemStream(SEQUENCES), total_steps=steps)
    stop = Stop()
    workers = FakeWorkers(crash_at=crash_at, ask_at=ask_at, stop=stop)
    run_dir = open_run_folder(cfg, inputs.total_steps)
    if crash_at is None and ask_at is None:
        train(cfg, inputs, make_cluster(workers, cfg), run_dir, stop)
    else:
        with pytest.raises(CrashError if crash_at else StoppedError):
            train(cfg, inputs, make_cluster(workers, cfg), run_dir, stop)
    return workers, read_metrics(run_dir)


def read_metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines
    ]


def test_a_step_is_one_update_on_the_next_sequences_and_asks_for_no_engine(tmp_path):
    workers, metrics = run(tmp_path, steps=3)
    step = ["actor.begin_step", "actor.update"]
    save = ["actor.begin_save", "actor.save_state", "actor.finish_save"]
    assert workers.methods == [*step, *step, *save, *step, *save]
    assert [line["step"] for line in metrics] == [0, 1, 2]
    for method, args in workers.calls:
        if method == "actor.update":
            assert sum(len(mb.lengths) for mbs, *_ in args for mb in mbs) == 3


def test_the_loss_falls_to_what_the_data_allows(tmp_path):
    """The unigram model can reach the entropy of the tokens' frequencies: about 1.1 nats."""
    _, metrics = run(tmp_path, steps=40)
    losses = [line["sft/loss"] for line in metrics]
    assert losses[0] > 2.0
    # Rates fall as 1 / step, so it creeps at the end: from 2.82 to 1.23 observed.
    assert sum(losses[-5:]) / 5 < 1.4


@pytest.mark.parametrize(
    "crash_at", [("actor.update", 0), ("actor.update", 3), ("actor.begin_save", 1)]
)
def test_a_run_that_died_goes_on_to_the_same_numbers(tmp_path, crash_at):
    whole, expected = run(tmp_path, folder="whole")
    run(tmp_path, crash_at=crash_at)
    resumed, metrics = run(tmp_path)
    assert metrics == expected
    assert resumed.actor.weights.equal(whole.actor.weights)


@pytest.mark.parametrize(("number", "step"), [(0, 1), (2, 3)])
def test_a_run_that_is_asked_to_end_finishes_its_step_and_goes_on_to_the_same_numbers(
    tmp_path, number, step
):
    whole, metrics = run(tmp_path, folder="whole")
    stopped, _ = run(tmp_path, ask_at=("actor.update", number))
    again, found = run(tmp_path)
    assert stopped.methods.count("actor.update") == step
    assert again.methods.count("actor.update") == 6 - step
    assert found == metrics
    assert again.actor.weights.equal(whole.actor.weights)
