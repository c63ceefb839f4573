"""The table of a plan that says what `trainer.max_staleness` would bring."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mcore_rl.config.run import RunConfig
from mcore_rl.plan.estimate import GIB, Estimate, ModelCounts, TrainerMemory
from mcore_rl.plan.memory import route_bytes_per_token
from mcore_rl.plan.overlap import Doing, Fleet, Overlap, StepSeconds, alone, simulate
from mcore_rl.plan.step import CHARACTERS_PER_TOKEN, StepPlan
from mcore_rl.plan.step_time import Speeds, Work
from mcore_rl.plan.times import (
    generation_time,
    long_tailed,
    measured_times,
    move_time,
    num_engines,
    slots,
    trainer_times,
    work_of_step,
)
from mcore_rl.types import Layout

AGES = (0, 1, 2, 4)
"""Values of `trainer.max_staleness` that are shown, in addition to the run's own."""
NUM_STEPS = 8
"""Number of steps that are averaged, without steps at the beginning and at the end."""
WAITING_TOKEN_BYTES = 4 + 4
"""Of a response that waits for its step: ids and the engine's log-probabilities."""
TRAINED_TOKEN_BYTES = 72
"""Of the step that trains, at most: answers, samples, what the trainer says of them, advantages,
what is packed and sent, and the journal's copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """Inputs of the simulation, in seconds."""

    generate: float
    """Generation of a step without other work meanwhile."""
    reward: float
    train: float
    sync: float
    prefill: float
    """Recomputation of one token by an engine."""
    draw: Callable[[random.Random], Sequence[float]]
    """Returns tokens of the responses of a step."""
    source: str


def generates_beside_training(cfg: RunConfig) -> bool:
    """Return whether the table says something of a run: it overlaps, or its engines are apart."""
    rollout = cfg.rollout
    return cfg.trainer.loop == "overlapped" or bool(rollout.nnodes or rollout.server_urls)


def overlap_lines(
    cfg: RunConfig, counts: ModelCounts, layout: Layout, step: StepPlan, found: Estimate
) -> Iterable[str]:
    """Yield the lines of the table.

    Args:
        cfg: the run.
        counts: of its models.
        layout: of the trainer.
        step: as it is packed.
        found: its memory.
    """
    work = work_of_step(cfg, step.prompt_tokens, step.response_tokens)
    engines = num_engines(cfg)
    # More requests at a time than a step has would slow each other: the times exclude that.
    most_running = min(slots(cfg, counts, found.engine, work), math.ceil(work.samples / engines))
    fleet = Fleet(num_engines=engines, slots=most_running)
    yield "overlap     generation beside training, simulated (plan/overlap.py)"
    if level := cfg.rollout.sleep_level:
        yield f"  not of engines that sleep while the trainer works (rollout.sleep_level={level}):"
        yield "  the end of a step's generation then overlaps with the beginning of the next one's"
        return
    if not most_running:
        yield "  an engine's cache holds no sample of the mean length"
        return
    times = _measured(cfg, work) or _estimated(cfg, counts, layout, step, work, found)
    ages, n = sorted({*AGES, cfg.trainer.max_staleness}), cfg.rollout.n
    lengths = [times.draw(random.Random(number)) for number in range(_num_draws(ages[-1]))]
    tokens = [[of[i : i + n] for i in range(0, len(of), n)] for of in lengths]
    per_token = times.generate / alone(tokens[:NUM_STEPS], fleet)
    draws = [[[per_token * num for num in group] for group in of_step] for of_step in tokens]
    rest = StepSeconds(
        train=times.train,
        reward=times.reward,
        sync=times.sync,
        recompute=times.prefill / per_token,
    )
    yield (
        f"  {engines} engines of {most_running} requests at a time; generation "
        f"{times.generate:.1f} s, rewards {rest.reward:.1f} s, training {rest.train:.1f} s, weight "
        f"sync {rest.sync:.1f} s"
    )
    yield f"  {times.source}"
    if not (cfg.rollout.nnodes or cfg.rollout.server_urls):
        yield "  engines and trainer share devices: that each slows the other is not counted"
    routes = work.tokens * route_bytes_per_token(counts.arch)
    replays = cfg.actor.router_replay.mode == "R3"
    yield (
        "  max_staleness    step s  trainer waits  engines busy  both work  age at most  buffer GiB"
        + "  routes GiB" * replays
    )
    characters = work.response_tokens * CHARACTERS_PER_TOKEN
    for age in ages:
        steps = simulate(draws[: _num_draws(age)], fleet, rest, age)
        mean = Overlap.of(steps[age + 1 :][:NUM_STEPS])
        ceiling = controller_bytes(work.tokens, characters, age)
        row = (
            f"{age:15d}{mean.step_s:10.1f}{mean.shares[Doing.WAIT]:15.0%}{mean.engines_busy:14.0%}"
            f"{mean.overlap:11.0%}{mean.oldest:13d}{ceiling / GIB:12.3f}"
        )
        yield row + f"{(age + 1) * routes / GIB:12.1f}" * replays
    yield "  buffer: host memory of the controller for samples that wait or train, at most"


def controller_bytes(num_tokens: int, num_characters: int, max_staleness: int) -> int:
    """Return what samples take at most in the controller's memory, in bytes, however fast the
    engines are: each step that may be begun has all its responses, and one of them trains.

    Args:
        num_tokens: of the samples of a step, with their prompts.
        num_characters: of the texts of their responses.
        max_staleness: of the run.
    """
    waiting = max_staleness * (num_tokens * WAITING_TOKEN_BYTES + num_characters)
    return waiting + num_tokens * TRAINED_TOKEN_BYTES + num_characters


def _num_draws(age: int) -> int:
    """Return the steps to simulate: as many as may be begun at once are left out at either end."""
    return NUM_STEPS + 2 * (age + 1)


def _measured(cfg: RunConfig, work: Work) -> _Times | None:
    found = measured_times(Path(cfg.trainer.default_local_dir))
    if found is None:
        return None
    most = float(cfg.data.max_response_length)
    return _Times(
        generate=found.generate,
        reward=found.reward,
        train=found.train,
        sync=found.sync,
        prefill=0.0,
        draw=partial(long_tailed, work.samples, found.mean, found.longest, most),
        source=f"medians of {found.num_steps} steps in {cfg.trainer.default_local_dir}; responses "
        f"of {found.mean:.0f} tokens in the mean, the longest about {found.longest:.0f}; what "
        "engines compute again after a sync is not counted",
    )


def _estimated(
    cfg: RunConfig,
    counts: ModelCounts,
    layout: Layout,
    step: StepPlan,
    work: Work,
    found: Estimate,
) -> _Times:
    speeds, model = Speeds(), counts.timed
    memory = TrainerMemory(stages=found.stages, memory=found.memory)
    stages = trainer_times(cfg, counts, layout, memory, work, speeds)
    engine = speeds.compute * cfg.rollout.tensor_model_parallel_size
    return _Times(
        generate=generation_time(cfg, counts, found.engine, work, speeds),
        reward=0.0,
        train=stages["forward"] + stages["train"] + move_time(cfg, memory, speeds),
        sync=stages["sync"],
        prefill=model.forward_flops(1, 0) / engine,
        draw=lambda source: source.sample(step.response_tokens, work.samples),
        source="estimates from formulas (plan/step_time.py) for an H100, rewards not counted, and "
        "lengths of the fake engine; a run folder with metrics has them measured",
    )
