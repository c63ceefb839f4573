"""Runs of the whole loop on fake workers, and what they leave behind."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl.errors import StoppedError
from mcore_rl.loop.loops import LOOPS
from mcore_rl.loop.recorded import Journal, recorded
from mcore_rl.loop.replayed import Playback, replayed
from mcore_rl.loop.stop import Stop
from mcore_rl.loop.validate import validate
from mcore_rl.observability.run_folder import JOURNAL
from mcore_rl.run.folder import open_run_folder
from tests.sequences import sequences_of
from tests.unit.loop.fake_workers import (
    REWARD,
    CrashError,
    FakeWorkers,
    make_cluster,
    make_config,
    make_inputs,
)


@dataclass
class Run:
    """One run of the loop and what it left behind."""

    folder: Path
    workers: FakeWorkers
    is_stopped: bool = False
    """Whether it ended because it was asked to."""

    @property
    def calls(self) -> list[str]:
        """What was asked for: ["sync to 0", "generate with 0", "actor.logprobs", ...]."""
        calls = []
        for (method, args), version in zip(self.workers.calls, self.workers.versions, strict=True):
            if method == "send_weights":
                calls.append(f"sync to {args[0][0]}")
            elif method == "generate":
                calls.append(f"generate with {version}")
            else:
                calls.append(method)
        return calls

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.workers.methods)

    def arguments(self, method: str) -> list[Any]:
        """Return the arguments by rank of every call of `method`."""
        return [args for called, args in self.workers.calls if called == method]

    @property
    def requests(self) -> list[list[list[Any]]]:
        """What the engines were asked for, by call and by rank."""
        return requests_of(self.workers)

    @property
    def updates(self) -> list[list[Any]]:
        """The sequences of every update, over both ranks."""
        return [
            [s for micro_batches, *_ in args for mb in micro_batches for s in sequences_of(mb)]
            for args in self.arguments("actor.update")
        ]

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Every line of metrics.jsonl without what the clock says."""
        return [
            {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}
            for line in self.lines("metrics.jsonl")
        ]

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


def run_in(
    root, *overrides, folder="run", steps=3, num_val=0, reward=REWARD, loop=None, **workers_kwargs
) -> Run:
    """Do a run with all its files below `root`.

    Like the command, it opens the run folder first, so that a second call with the same folder is a
    resume in a new process. A crash that the workers were told of is swallowed, and so is the end
    of a run that they asked to end.
    """
    reward_file = root / "reward.py"
    reward_file.write_text(reward)
    cfg = make_config(*overrides, folder=root / folder)
    inputs = make_inputs(reward_file, cfg, steps, num_val)
    run_dir = open_run_folder(cfg, inputs.total_steps)
    stop = Stop()
    workers = FakeWorkers(temperature=cfg.rollout.temperature, stop=stop, **workers_kwargs)
    cluster, is_stopped = make_cluster(workers, cfg), False
    stop.interrupts(cluster.interrupt, inputs.scorer.interrupt)
    try:
        if loop is validate:
            validate(cfg, inputs, cluster, run_dir)
        else:
            journal = Journal(run_dir / JOURNAL)
            cluster, inputs = recorded(cluster, inputs, journal)
            LOOPS[cfg.trainer.loop](cfg, inputs, cluster, run_dir, stop)
            journal.close()
        assert workers.crash_at is None, "the crash never came"
    except CrashError:
        pass
    except StoppedError:
        is_stopped = True
    return Run(run_dir, workers, is_stopped)


def replay_in(root, *overrides, folder="run", steps=3, num_val=0) -> Run:
    """Do the run in a folder below `root` again from its journal, as `mcore-rl replay` does."""
    reward_file = root / "no_reward.py"
    reward_file.write_text("def compute_score(**_):\n    raise AssertionError('it is not asked')\n")
    cfg = make_config(*overrides, folder=root / folder / "replays" / "1")
    inputs = make_inputs(reward_file, cfg, steps, num_val)
    run_dir = open_run_folder(cfg, inputs.total_steps)
    stop, workers = Stop(), FakeWorkers(temperature=cfg.rollout.temperature)
    cluster = make_cluster(workers, cfg, engine_size=None)
    playback = Playback(root / folder / JOURNAL)
    cluster, inputs = replayed(cluster, inputs, playback, lambda _: "", stop.ask)
    journal, is_stopped = Journal(run_dir / JOURNAL), False
    cluster, inputs = recorded(cluster, inputs, journal)
    try:
        LOOPS[cfg.trainer.loop](cfg, inputs, cluster, run_dir, stop)
        journal.close()
    except StoppedError:
        is_stopped = True
    return Run(run_dir, workers, is_stopped)


def requests_of(workers: FakeWorkers) -> list[list[list[Any]]]:
    """Return the requests of each call to generate, by rank."""
    return [
        [[request for group in groups for request in group] for _, groups, _ in args]
        for called, args in workers.calls
        if called == "generate"
    ]
