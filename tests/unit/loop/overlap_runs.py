"""Runs of the overlapped loop on a virtual clock, and what they took."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_rl.data.prompts import ItemStream
from mcore_rl.loop import overlapped
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.recorded import Journal, recorded
from mcore_rl.loop.stop import Stop
from mcore_rl.plan.overlap import Fleet, Requests, StepSeconds
from tests.unit.loop.fake_workers import END, make_config, make_prompts
from tests.unit.loop.virtual_cluster import (
    Clock,
    Latencies,
    TokenEngine,
    VirtualEngine,
    VirtualScorer,
    VirtualWorkers,
    make_cluster,
)

GROUP = 4
STEPS = 20
MOST_TOKENS = 320


def steady(_: int) -> int:
    return 40


def long_tailed(seed: int) -> int:
    """Of ten responses nine have 20 to 40 tokens, the other up to eight times as many."""
    source = random.Random(seed)
    return source.randint(20, 40) * (source.randint(2, 8) if source.random() < 0.1 else 1)


@dataclass(frozen=True, kw_only=True)
class Setting:
    max_staleness: int
    length_of: Callable[[int], int]
    seconds: Latencies
    prompts: int = 8
    slots: int = 8
    num_engines: int = 1
    updates: int = 1
    most_tokens: int = MOST_TOKENS
    """Of a response."""

    @property
    def step(self) -> StepSeconds:
        seconds = self.seconds
        return StepSeconds(
            train=seconds.logprobs + seconds.update * self.updates,
            reward=seconds.reward,
            sync=seconds.sync,
            recompute=seconds.computed_token / seconds.token,
        )

    @property
    def fleet(self) -> Fleet:
        return Fleet(num_engines=self.num_engines, slots=self.slots)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run of the loop took."""

    run_dir: Path
    steps: Sequence[float]
    """Seconds of each."""
    busy: float
    """Share of the time in which engines had requests, in the mean over engines."""
    oldest: Sequence[float]
    """Of each step: the largest age, as it is logged."""
    draws: Sequence[Requests]
    """What the engines were asked for, by step."""

    @property
    def step_s(self) -> float:
        return statistics.fmean(self.steps)


def measure(run_dir, setting: Setting) -> Measured:
    """Do a run of the loop."""
    clock, seconds = Clock(), setting.seconds
    engines = [
        VirtualEngine(clock, TokenEngine(setting.slots, setting.length_of), seconds)
        for _ in range(setting.num_engines)
    ]
    workers = VirtualWorkers(clock, seconds, engines)
    cfg = make_config(
        "trainer.loop=overlapped",
        f"trainer.max_staleness={setting.max_staleness}",
        "rollout.host=process",
        "rollout.nnodes=1",
        f"rollout.n_gpus_per_node={setting.num_engines}",
        f"rollout.n={GROUP}",
        "rollout.compare_loaded_weights=false",
        f"data.train_batch_size={setting.prompts}",
        f"data.max_response_length={setting.most_tokens}",
        "trainer.log_val_generations=1",
        f"actor.ppo_mini_batch_size={setting.prompts // setting.updates}",
        folder=run_dir,
    )
    inputs = RunInputs(
        prompts=ItemStream(make_prompts(64, 0, "train"), seed=0),
        val_prompts=[],
        scorer=VirtualScorer(cfg, clock, seconds.reward),
        stop_token_ids=[END],
        token_texts=lambda ids: [f" {i}" for i in ids],
        total_steps=STEPS,
    )
    cluster, inputs = recorded(make_cluster(workers, cfg), inputs, Journal(run_dir / "journal"))
    overlapped.train(cfg, inputs, cluster, run_dir, Stop())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = [*workers.step_began, clock.now]
    busy = statistics.fmean(engine.busy_s(since=times[0]) for engine in engines)
    return Measured(
        run_dir=run_dir,
        steps=[after - before for before, after in itertools.pairwise(times)],
        busy=busy / (times[-1] - times[0]),
        oldest=[line["rollout/staleness/max"] for line in lines],
        draws=[
            [[num * seconds.token for num in group] for group in groups]
            for groups in map(groups_of, zip(*(engine.batches for engine in engines), strict=True))
        ][1:],  # the first is the check before step 0
    )


def groups_of(shares: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Return the groups of a step, which go round the engines, from the share of each."""
    by_engine = [in_groups(share, GROUP) for share in shares]
    return [group for turn in zip(*by_engine, strict=True) for group in turn]


def in_groups(values, size):
    return [values[first : first + size] for first in range(0, len(values), size)]
