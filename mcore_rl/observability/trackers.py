"""Where the metrics of a step go: `metrics.jsonl` always, and the trackers in `trainer.logger`.

Lives in the controller only. Steps count from 0 and each is logged once, in order; what is measured
after the last step, a final validation, is logged as step `total_steps`. A tracker that cannot
write ends the run; none of them changes what the run computes.

Adding one: a class with `__init__(run)`, `log` and `close`, registered in TRACKERS.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mcore_rl.durable_files import make_private
from mcore_rl.errors import UserError
from mcore_rl.metrics import Metrics, to_floats
from mcore_rl.observability.jsonl import StepFile, failed_write_ends_run
from mcore_rl.observability.run_folder import METRICS_FILE
from mcore_rl.observability.timers import StepTimers, format_duration
from mcore_rl.printable import printable
from mcore_rl.registry import Registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a tracker knows about the run."""

    dir: Path
    """The run's folder: "runs/quickstart/gmpo"."""
    total_steps: int
    """Steps of the whole run; the last one is total_steps - 1."""
    start_step: int
    """First step that this process does; > 0 after a resume."""
    project: str
    """trainer.project_name."""
    experiment: str
    """trainer.experiment_name."""


class Tracker:
    """Receives the numbers of each step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of `step`; steps arrive once each, in order."""
        raise NotImplementedError

    def stage(self, name: str) -> None:
        """Take note that a stage begins; only a live display uses it."""

    def close(self) -> None:
        """Finish the display and pending writes."""


TRACKERS: Registry[Callable[[RunInfo], Tracker]] = Registry("tracker", "trainer.logger")


class RunLog:
    """Sends each step's metrics to all trackers of a run.

    Args:
        run_dir: the run's folder; made if it is missing.
        loggers: names from TRACKERS; "jsonl" is always among them, named or not.
        total_steps: steps of the whole run.
        start_step: first step that this process does; what an earlier process logged from this
            step on is dropped.
        project: trainer.project_name.
        experiment: trainer.experiment_name.

    Raises:
        UserError: if there is no such tracker or its package is missing.
        RunError: if the run folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        loggers: Sequence[str],
        total_steps: int,
        start_step: int,
        project: str,
        experiment: str,
    ) -> None:
        run = RunInfo(
            dir=run_dir,
            total_steps=total_steps,
            start_step=start_step,
            project=project,
            experiment=experiment,
        )
        factories = [TRACKERS.get(name) for name in dict.fromkeys(["jsonl", *loggers])]
        with failed_write_ends_run(run_dir, start_step):
            make_private(run_dir)
            self._trackers = [factory(run) for factory in factories]
        self._run_dir = run_dir
        self._timers = StepTimers()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show `name` on the live progress line while the block runs, and time it."""
        for tracker in self._trackers:
            tracker.stage(name)
        with self._timers.time(name):
            yield

    def times(self) -> Metrics:
        """Return `time/<stage>` of the stages since the last call; see `StepTimers.metrics`."""
        return self._timers.metrics()

    def log(self, step: int, metrics: Metrics) -> None:
        """Reduce the metrics to numbers and hand them to every tracker.

        Raises:
            RunError: if one of them cannot be written.
        """
        numbers = dict(sorted(to_floats(metrics).items()))
        with failed_write_ends_run(self._run_dir, step):
            for tracker in self._trackers:
                tracker.log(step, numbers)

    def close(self) -> None:
        """Close every tracker; call it also when the run fails, because it restores the
        terminal."""
        for tracker in self._trackers:
            tracker.close()


@TRACKERS.register("jsonl")
class JsonlTracker(Tracker):
    """`metrics.jsonl` in the run folder: {"step": 0, "actor/grad_norm": 0.7, ...}."""

    def __init__(self, run: RunInfo) -> None:
        self._file = StepFile(run.dir / METRICS_FILE, run.start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.append({"step": step, **metrics})


@TRACKERS.register("tensorboard")
class TensorboardTracker(Tracker):
    """Event files in `tensorboard/` of the run folder; flushed at each step."""

    def __init__(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only who asks for it needs tensorboard

        self._writer = SummaryWriter(
            log_dir=str(run.dir / "tensorboard"), purge_step=run.start_step
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(printable(key), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@TRACKERS.register("wandb")
class WandbTracker(Tracker):
    """Weights & Biases; offline, to be sent by `wandb sync`, when its server does not take the run.

    A resumed run continues the run whose id the run folder keeps.
    """

    def __init__(self, run: RunInfo) -> None:
        wandb = _optional("wandb")
        start = functools.partial(
            wandb.init,
            project=run.project,
            name=run.experiment,
            id=_run_id(run, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(run.dir),
        )
        try:
            self._run = start()
        except wandb.errors.Error as error:  # no account set up, or no network
            logger.warning("wandb writes to %s/wandb, offline: %s", run.dir, error)
            self._run = start(mode="offline")
        # wandb's own step never goes back, so it would ignore what a resumed run does again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**{printable(key): value for key, value in metrics.items()}, "step": step})

    def close(self) -> None:
        self._run.finish()


@TRACKERS.register("mlflow")
class MlflowTracker(Tracker):
    """MLflow, at MLFLOW_TRACKING_URI; a resumed run continues the run whose id the folder keeps."""

    def __init__(self, run: RunInfo) -> None:
        mlflow = _optional("mlflow")
        self._client = client = mlflow.MlflowClient()
        self._metric = mlflow.entities.Metric
        found = client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else client.create_experiment(run.project)
        start = functools.partial(client.create_run, experiment, run_name=run.experiment)
        self._id = _run_id(run, "mlflow", lambda: start().info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        # It takes no other characters in a name.
        named = {re.sub(r"[^\w .:/-]", "_", key, flags=re.ASCII): v for key, v in metrics.items()}
        entries = [self._metric(key, value, now, step) for key, value in named.items()]
        self._client.log_batch(self._id, entries)

    def close(self) -> None:
        self._client.set_terminated(self._id)


@TRACKERS.register("swanlab")
class SwanlabTracker(Tracker):
    """SwanLab; offline, to be sent by `swanlab sync`, where nobody has logged in."""

    def __init__(self, run: RunInfo) -> None:
        swanlab = _optional("swanlab")
        start = functools.partial(
            swanlab.init,
            settings=swanlab.Settings(interactive=False),  # nobody may sit before a run
            project=run.project,
            name=run.experiment,
            id=_run_id(run, "swanlab", lambda: uuid.uuid4().hex[:21]),
            resume="allow",
            log_dir=str(run.dir / "swanlab"),
        )
        try:
            self._run = start()
        except RuntimeError as error:  # no account set up, or no network
            logger.warning("swanlab writes to %s/swanlab, offline: %s", run.dir, error)
            self._run = start(mode="offline")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({printable(key): value for key, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


@TRACKERS.register("trackio")
class TrackioTracker(Tracker):
    """Trackio, in TRACKIO_DIR; a resumed run continues the run of its name."""

    def __init__(self, run: RunInfo) -> None:
        self._trackio = _optional("trackio")
        self._trackio.init(
            project=run.project,
            name=_run_id(run, "trackio", lambda: f"{run.experiment}-{uuid.uuid4().hex[:8]}"),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log({printable(key): value for key, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._trackio.finish()


def _optional(package: str) -> Any:
    """Return a package that only its tracker needs."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"trainer.logger={package!r} needs the package {package}, which cannot be imported:"
            f' {error}. Install it with: pip install "mcore-rl[{package}]"'
        ) from error


def _run_id(run: RunInfo, service: str, make: Callable[[], str]) -> str:
    """Return the id of the run at a service; it is kept in the run folder for a resumed run."""
    file = run.dir / f"{service}_run_id"
    if run.start_step == 0 or not file.exists():
        file.write_text(make())
    return file.read_text()


@TRACKERS.register("console")
def make_console(run: RunInfo) -> Tracker:
    """Return tables with a live progress line on a terminal, one log line per step elsewhere."""
    return TerminalTracker(run) if sys.stdout.isatty() else LogLineTracker(run)


class TerminalTracker(Tracker):
    """A table per step above a live line: done/total, stage, reward, time left.

    Args:
        run: the run.
        console: where to draw; stdout when None.
    """

    def __init__(self, run: RunInfo, console: Console | None = None) -> None:
        self._run = run
        self._clock = RemainingTime(run)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[stage]:<12}"),
            TextColumn("reward {task.fields[reward]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console,
        )
        self._task = self._progress.add_task(
            _shown(run.experiment),
            total=run.total_steps,
            completed=run.start_step,
            stage="",
            reward="-",
            left="-",
        )

    def stage(self, name: str) -> None:
        self._progress.update(self._task, stage=name)
        self._progress.start()  # at the first stage, so that a run that fails before draws nothing

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.console.print(step_table(step, metrics))
        if "reward/mean" in metrics:
            self._progress.update(self._task, reward=_format(metrics["reward/mean"]))
        num_done = min(step + 1, self._run.total_steps)
        self._progress.update(
            self._task, completed=num_done, stage="", left=self._clock.after(step)
        )

    def close(self) -> None:
        self._progress.stop()


class LogLineTracker(Tracker):
    """One log line per step with the numbers that show the state of a run."""

    HEADLINE = (
        "reward/mean",
        "rollout/response_tokens/mean",
        "sft/loss",
        "actor/pg_loss",
        "actor/grad_norm",
        "mismatch/logprob_abs_diff/max",
        "time/step",
    )

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._clock = RemainingTime(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        accuracies = [
            key for key in metrics if key.startswith("eval/") and key.endswith("/accuracy")
        ]
        shown = [key for key in (*self.HEADLINE, *accuracies) if key in metrics]
        numbers = "  ".join(f"{key} {_format(metrics[key])}" for key in shown)
        left = self._clock.after(step)
        logger.info("step %d of %d  %s  left %s", step, self._run.total_steps, numbers, left)


class RemainingTime:
    """Estimates the time left from the mean time of the steps done by this process."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._start = time.perf_counter()

    def after(self, step: int) -> str:
        """Return the time left when `step` is done, as h:mm:ss."""
        num_done = step + 1 - self._run.start_step
        num_left = self._run.total_steps - step - 1
        step_seconds = (time.perf_counter() - self._start) / max(1, num_done)
        return format_duration(step_seconds * max(0, num_left))


def step_table(step: int, metrics: Mapping[str, float]) -> Table:
    """Return a compact table of one step: a row per section, the numbers side by side."""
    sections: dict[str, list[str]] = defaultdict(list)
    for key in sorted(metrics):
        section, _, name = key.partition("/")
        sections[section].append(f"[dim]{_shown(name)}[/dim] {_format(metrics[key])}")
    table = Table(title=f"step {step}", title_justify="left", box=None, show_header=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for section, cells in sections.items():
        table.add_row(_shown(section), "   ".join(cells))
    return table


def _shown(text: str) -> str:
    return escape(printable(text))


def _format(value: float) -> str:
    return f"{value:.4g}"
