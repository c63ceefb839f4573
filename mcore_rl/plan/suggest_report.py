"""The suggestions as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields

from mcore_rl.cluster.phases import Phase
from mcore_rl.config.checks import a_model_is_named, training_data_is_named
from mcore_rl.config.run import RunConfig
from mcore_rl.dtypes import BYTES
from mcore_rl.models.spec import load_hf_config
from mcore_rl.plan.candidates import value_of
from mcore_rl.plan.estimate import GIB, ModelCounts, engine_type
from mcore_rl.plan.memory import route_bytes_per_token
from mcore_rl.plan.step import prompt_lengths
from mcore_rl.plan.step_time import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    LINK_SHARE,
    Speeds,
    Work,
)
from mcore_rl.plan.suggest import Suggestion, Suggestions, suggest, work_of

MOST_IMPOSSIBLE = 40
"""Lines of what does not fit."""
STAGES = ("generate", "forward", "train", "sync", "move")


def write_suggestions(cfg: RunConfig, fixed: Sequence[str], speeds: Speeds, top: int) -> None:
    """Write what `suggest` finds for a run to stdout; its own layout need not be possible.

    Raises:
        UserError: for a problem that no layout can fix.
    """
    a_model_is_named(cfg)
    training_data_is_named(cfg)
    counts = ModelCounts(cfg, load_hf_config(cfg.model.folder))
    work = work_of(cfg, prompt_lengths(cfg))
    found = suggest(cfg, counts, work, speeds, fixed)
    lines = suggestion_lines(cfg, counts, work, speeds, found, top)
    sys.stdout.write("\n".join(lines) + "\n")


def suggestion_lines(
    cfg: RunConfig,
    counts: ModelCounts,
    work: Work,
    speeds: Speeds,
    found: Suggestions,
    top: int,
) -> Iterable[str]:
    """Yield the lines of a table of the fastest `top`, their keys, and what is impossible."""
    trainer, rollout = cfg.trainer, cfg.rollout
    nodes = trainer.nnodes + rollout.nnodes
    yield (
        f"suggest     {counts.num_parameters:,} parameters on {nodes} nodes of "
        f"{trainer.n_gpus_per_node} devices of {trainer.device_memory_gib:g} GiB "
        f"(trainer.device_memory_gib): {len(found.fitting)} layouts fit, "
        f"{len(found.impossible)} do not"
    )
    given = ", ".join(
        f"--{field.name.replace('_', '-')} {getattr(speeds, field.name):g}"
        for field in fields(speeds)
    )
    yield (
        f"  seconds are estimates from formulas (plan/step_time.py), assuming {given}, of which "
        f"{COMPUTE_SHARE:.0%}, {BANDWIDTH_SHARE:.0%} and of links {LINK_SHARE:.0%} are reached; "
        "they rank, they promise nothing"
    )
    updates = work.updates * work.epochs
    yield (
        f"  a step: {work.samples} samples of {work.mean:.0f} tokens in the mean, {updates} "
        f"updates; {_bytes_line(cfg, counts, work)}"
    )
    yield ""
    if found.fitting:
        yield from _table(found.fitting[:top])
        yield ""
    for number, one in enumerate(found.fitting[:top], start=1):
        yield f"  {number:2d}  {' '.join(_assignments(cfg, one))}"
    if found.impossible:
        yield ""
        yield "  impossible:"
    for name, why in list(found.impossible.items())[:MOST_IMPOSSIBLE]:
        yield f"    {name}: {why}"
    if (more := len(found.impossible) - MOST_IMPOSSIBLE) > 0:
        yield f"    ... and {more} more"


def _bytes_line(cfg: RunConfig, counts: ModelCounts, work: Work) -> str:
    """Return the bytes that move, other than activations."""
    weights = counts.num_parameters * BYTES[engine_type(cfg)] / GIB
    line = f"a sync brings {weights:.1f} GiB of weights to each engine"
    per_token = route_bytes_per_token(counts.arch)
    if not per_token:
        return line
    routes = work.tokens * per_token / GIB
    is_on = cfg.actor.router_replay.mode != "disabled"
    return f"{line}; routes {'are' if is_on else 'would be'} {routes:.1f} GiB"


def _table(shown: Sequence[Suggestion]) -> Iterable[str]:
    yield (
        "   #  step s" + "".join(f"{name:>10s}" for name in STAGES) + "   train GiB  gener. GiB"
        "  host GiB/node  layout"
    )
    for number, one in enumerate(shown, start=1):
        moments = {moment.phase: moment.total for moment in one.estimate.moments}
        host = one.estimate.host_per_device * one.cfg.trainer.n_gpus_per_node
        times = "".join(f"{one.seconds[name]:10.1f}" for name in STAGES)
        yield (
            f"  {number:2d}{one.step_s:8.1f}{times}{moments[Phase.TRAIN] / GIB:12.1f}"
            f"{_generation_memory(one) / GIB:12.1f}{host / GIB:15.0f}  {_layout(one)}"
        )


def _generation_memory(one: Suggestion) -> float:
    """Return the bytes of a device that generates."""
    engine = one.estimate.engine
    if one.cfg.rollout.nnodes:
        return engine.weights + engine.kv_cache
    (moment,) = [m for m in one.estimate.moments if m.phase is Phase.GENERATE]
    return moment.total


def _layout(one: Suggestion) -> str:
    layout, rollout = one.layout, one.cfg.rollout
    sizes = f"tp {layout.tp} pp {layout.pp} cp {layout.cp} dp {layout.dp}"
    if layout.ep > 1 or layout.etp != layout.tp:
        sizes += f" ep {layout.ep} etp {layout.etp}"
    engine = f"engines of {rollout.tensor_model_parallel_size}"
    if rollout.nnodes:
        engine += f" on {rollout.nnodes} x {rollout.n_gpus_per_node} devices of their own"
    notes = [sizes, engine]
    if one.cfg.offloads.actor:
        notes.append("offload")
    if rollout.sleep_level:
        notes.append(f"sleep {rollout.sleep_level}")
    if one.cfg.actor.megatron.override_transformer_config.get("recompute_granularity"):
        notes.append("recompute")
    return ", ".join(notes)


def _assignments(cfg: RunConfig, one: Suggestion) -> Iterable[str]:
    """Yield the assignments of a command line that make `cfg` the suggestion."""
    for key, value in one.values.items():
        before = value_of(cfg, key)
        if value == before:
            continue
        if isinstance(value, dict):
            for name, inner in value.items():
                if before.get(name) != inner:
                    yield f"{key}.{name}={inner}"
            for name in before.keys() - value.keys():
                yield f"{key}.{name}=null"
            continue
        yield f"{key}={_text(value)}"


def _text(value: object) -> str:
    """Return a value as a command line has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
