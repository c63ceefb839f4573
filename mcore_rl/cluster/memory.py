"""The measured memory of the train workers in each phase of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.cluster.group import WorkerGroup, call_all
from mcore_rl.cluster.phases import Phase
from mcore_rl.metrics import Metrics, maximum
from mcore_rl.workers.roles import Actor, Critic, Memory, Rollout, WeightSource

PHASES: Mapping[Callable[..., Any], Phase] = {
    Rollout.generate: Phase.GENERATE,
    Actor.logprobs: Phase.LOGPROBS,
    Actor.record_logprobs: Phase.LOGPROBS,
    Actor.ref_logprobs: Phase.REF_LOGPROBS,
    Critic.values: Phase.VALUES,
    Critic.update: Phase.TRAIN_CRITIC,
    Actor.update: Phase.TRAIN,
    WeightSource.send_weights: Phase.SYNC,
    Actor.begin_save: Phase.SAVE,
    Critic.begin_save: Phase.SAVE_CRITIC,
    Actor.export_hf: Phase.EXPORT,
}
"""The work of each phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Memory of the worker that held most, in bytes."""

    peaks: Mapping[Phase, int]
    """The most in each phase that the run had."""
    held: int
    """Memory at the end, when freed memory has been given back."""
    is_of_host: bool
    """As `MemoryUse.is_of_host`."""


def peak_metrics(workers: WorkerGroup) -> Metrics:
    """Return the peak memory since the last call, of the train worker with the highest peak."""
    peaks = [peak for peak in call_all(workers, Memory.take_peak) if peak is not None]
    return {"perf/memory_peak_gib": maximum(max(peaks) / 2**30)} if peaks else {}


def measured(workers: WorkerGroup) -> Measured | None:
    """Return the memory of the train workers so far; None where it cannot be measured."""
    found = [use for use in call_all(workers, Memory.memory_use) if use is not None]
    if not found:
        return None
    peaks: dict[Phase, int] = {}
    for use in found:
        for method, peak in use.peaks.items():
            if phase := PHASES.get(method):
                peaks[phase] = max(peak, peaks.get(phase, 0))
    return Measured(
        peaks={phase: peaks[phase] for phase in Phase if phase in peaks},
        held=max(use.held for use in found),
        is_of_host=any(use.is_of_host for use in found),
    )
