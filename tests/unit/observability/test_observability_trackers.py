"""Trackers write what was logged, once per step, and a resumed run continues the same files."""

from __future__ import annotations

import collections
import io
import json
import logging
import re
import sys
import types

import pytest
import torch
from rich.console import Console

from mcore_rl.errors import RunError, UserError
from mcore_rl.metrics import maximum, mean, total
from mcore_rl.observability.trackers import RunInfo, RunLog, TerminalTracker, step_table
from tests.file_limit import files_no_longer_than


def open_log(run_dir, *loggers, start_step=0, total_steps=10):
    return RunLog(run_dir, loggers, total_steps, start_step, project="p", experiment="e")


def read_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_json_line_with_reduced_numbers(tmp_path):
    log = open_log(tmp_path / "new" / "run")
    log.log(0, {"reward/mean": mean(0.25, 4), "actor/ratio/max": maximum(torch.tensor(1.5))})
    log.log(1, {"reward/mean": mean(0.5), "empty/mean": mean(0.0, 0)})
    assert read_metrics(tmp_path / "new" / "run") == [
        {"step": 0, "actor/ratio/max": 1.5, "reward/mean": 0.25},
        {"step": 1, "reward/mean": 0.5},
    ]


def test_a_line_is_on_disk_before_the_log_is_closed_and_floats_are_exact(tmp_path):
    log = open_log(tmp_path)
    log.log(0, {"actor/pg_loss": total(0.1 + 0.2)})
    assert read_metrics(tmp_path)[0]["actor/pg_loss"] == 0.1 + 0.2


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    def run(run_dir, first, last):
        log = open_log(run_dir, start_step=first)
        for step in range(first, last):
            log.log(step, {"reward/mean": mean(step / 7)})
        log.close()

    run(tmp_path / "whole", 0, 6)
    run(tmp_path / "resumed", 0, 5)
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rewa')  # killed in the middle of a line
    run(tmp_path / "resumed", 3, 6)  # the checkpoint was older than the last logged step
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_corrupt_line_is_named_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
        open_log(tmp_path, start_step=3)


def test_an_unknown_logger_names_the_closest_one(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.logger='tensorbord'.*'tensorboard'"):
        open_log(tmp_path, "tensorbord")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab", "trackio"])
def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # what import sees when it is not installed
    with pytest.raises(UserError, match=rf"mcore-rl\[{name}\]"):
        open_log(tmp_path, name)


class WandbRun:
    """A run of wandb as far as its documentation says what becomes of steps: its own step counts
    the calls of `log` and ignores a lower one, `define_metric` makes another key the axis."""

    def __init__(self) -> None:
        self.rows, self.axes, self._step = [], {}, 0

    def define_metric(self, name, *, step_metric):
        self.axes[name] = step_metric

    def log(self, row, step=None):
        step = self._step if step is None else step
        if step >= self._step:
            self.rows.append(row)
            self._step = step + 1

    def finish(self):
        pass


def test_wandb_takes_the_steps_that_a_resumed_run_does_again(tmp_path, monkeypatch):
    """Both runs of the program write one run of wandb, known by the id in the run folder."""
    runs = collections.defaultdict(WandbRun)
    wandb = types.SimpleNamespace(
        init=lambda *, id, **others: runs[id],
        errors=types.SimpleNamespace(Error=OSError),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first, value in ((0, 1.0), (2, 9.0)):
        log = open_log(tmp_path, "wandb", start_step=first)
        for step in range(first, 4):
            log.log(step, {"reward/mean": mean(value)})
        log.close()
    [run] = runs.values()
    assert run.axes == {"*": "step"}
    shown = {row["step"]: row["reward/mean"] for row in run.rows}
    assert shown == {0: 1.0, 1: 1.0, 2: 9.0, 3: 9.0}


def log_and_resume(run_dir, name):
    """Log four steps, the last two of them again in a resumed run, as name/[x] to the tracker."""
    for first, value in ((0, 1.0), (2, 9.0)):
        log = open_log(run_dir, name, start_step=first)
        for step in range(first, 4):
            log.log(step, {"reward/[x]/mean": mean(value), "actor/lr": mean(step)})
        log.close()


@pytest.mark.starts_processes
def test_mlflow_has_one_run_whose_last_word_on_a_step_is_the_resumed_run_s(tmp_path, monkeypatch):
    """With the package itself, where it is installed."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlflow").as_uri())
    log_and_resume(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    experiments = [client.get_experiment_by_name("p").experiment_id]
    (run,) = client.search_runs(experiments)
    assert run.info.run_name == "e"
    history = client.get_metric_history(run.info.run_id, "reward/_x_/mean")
    assert [(point.step, point.value) for point in history] == [
        *((step, 1.0) for step in range(4)),
        (2, 9.0),
        (3, 9.0),
    ]


@pytest.mark.starts_processes
def test_swanlab_writes_offline_where_nobody_has_logged_in(tmp_path, monkeypatch, caplog):
    """With the package itself, where it is installed."""
    pytest.importorskip("swanlab")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    log_and_resume(tmp_path / "run", "swanlab")
    assert "offline" in caplog.text
    files = list((tmp_path / "run" / "swanlab").glob("run-*/run-*.swanlab"))
    assert {file.stem for file in files} == {
        f"run-{(tmp_path / 'run' / 'swanlab_run_id').read_text()}"
    }
    assert b"reward/[x]/mean" in b"".join(file.read_bytes() for file in files)


@pytest.mark.starts_processes
def test_trackio_has_one_run_with_the_steps_of_both(tmp_path, monkeypatch):
    """With the package itself, where it is installed."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    log_and_resume(tmp_path / "run", "trackio")
    (run,) = trackio.Api().runs("p")
    assert run.name == (tmp_path / "run" / "trackio_run_id").read_text()
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("p", run.name)
    assert [(row["step"], row["reward/[x]/mean"]) for row in rows] == [
        *((step, 1.0) for step in range(4)),
        (2, 9.0),
        (3, 9.0),
    ]


def test_tensorboard_files_hold_the_logged_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, "tensorboard")
    for step in range(3):
        log.log(step, {"reward/mean": mean(step / 2)})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(event.step, event.value) for event in events] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_does_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((0, 1.0), (2, 9.0)):
        log = open_log(tmp_path, "tensorboard", start_step=first)
        for step in range(first, 4):
            log.log(step, {"reward/mean": mean(value)})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(e.step, e.value) for e in events] == [(0, 1.0), (1, 1.0), (2, 9.0), (3, 9.0)]


def test_a_write_that_fails_ends_the_run_and_names_file_and_step(tmp_path):
    log = open_log(tmp_path)
    log.log(0, {"reward/mean": mean(1.0)})
    with (
        files_no_longer_than(40),
        pytest.raises(RunError, match=r"step 1\] cannot write .*metrics\.jsonl"),
    ):
        log.log(1, {"reward/mean": mean(1.0)})
    log.close()
    open_log(tmp_path, start_step=1).log(1, {})  # the torn line is gone
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_a_run_folder_that_cannot_be_made_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        open_log(tmp_path / "file" / "run")


def test_console_without_a_terminal_is_one_log_line_per_step(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, "console", total_steps=4)
    with log.stage("rollout"):
        pass
    log.log(0, {"reward/mean": mean(0.25), "eval/gsm8k/accuracy": mean(0.5), "moe/x": mean(1.0)})
    log.close()
    (line,) = [record.getMessage() for record in caplog.records]
    shown = r"step 0 of 4  reward/mean 0\.25  eval/gsm8k/accuracy 0\.5  left \d+:\d\d:\d\d"
    assert re.fullmatch(shown, line)


def test_terminal_shows_stage_reward_and_progress(tmp_path):
    screen = io.StringIO()
    run = RunInfo(dir=tmp_path, total_steps=7, start_step=2, project="p", experiment="run[1]")
    tracker = TerminalTracker(run, Console(file=screen, force_terminal=True, width=120))
    tracker.stage("rollout")
    tracker.log(2, {"reward/mean": 0.375})
    tracker.close()
    text = screen.getvalue()
    for shown in ("run[1]", "2/7", "rollout", "3/7", "reward 0.375", "step 2"):
        assert shown in text, shown


def test_a_final_validation_keeps_the_reward_and_does_not_overrun_the_progress(tmp_path):
    screen = io.StringIO()
    run = RunInfo(dir=tmp_path, total_steps=1, start_step=0, project="p", experiment="e")
    tracker = TerminalTracker(run, Console(file=screen, force_terminal=True, width=120))
    tracker.stage("rollout")
    tracker.log(0, {"reward/mean": 0.375})
    tracker.log(1, {"eval/gsm8k/accuracy": 0.5})
    tracker.close()
    last_line = screen.getvalue().rpartition("step 1")[2]
    assert "1/1" in last_line
    assert "reward 0.375" in last_line
    assert "2/1" not in last_line


def test_step_table_has_a_row_per_section_and_every_metric():
    screen = io.StringIO()
    metrics = {"actor/lr": 1e-6, "actor/ratio/max": 1.25, "reward/[x]/mean": 0.5}
    Console(file=screen, width=100).print(step_table(4, metrics))
    title, *rows = (line.split() for line in screen.getvalue().splitlines())
    assert title == ["step", "4"]
    assert rows == [
        ["actor", "lr", "1e-06", "ratio/max", "1.25"],
        ["reward", "[x]/mean", "0.5"],
    ]


def test_a_metric_s_name_commands_no_terminal():
    file = io.StringIO()
    console = Console(file=file, width=200)
    console.print(step_table(0, {"eval/\x1b[2Jset/accuracy": 0.5, "\x1b[1m/x": 1.0}))
    shown = file.getvalue()
    assert "\x1b" not in shown
    assert r"\x1b[2Jset/accuracy" in shown


def test_a_metric_s_name_that_no_encoding_has_is_logged_everywhere(tmp_path):
    log = open_log(tmp_path, "tensorboard")
    log.log(0, {"eval/\ud83d/accuracy": mean(0.5)})
    log.close()
    assert '"eval/\\ud83d/accuracy": 0.5' in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_folder_is_its_owner_s_alone(tmp_path):
    open_log(tmp_path / "outputs" / "run").close()
    assert (tmp_path / "outputs" / "run").stat().st_mode & 0o777 == 0o700
