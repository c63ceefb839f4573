"""Training during generation: while a step trains, the engines generate for the coming steps.

The loop of `on_policy.py` with one difference: the samples of step s were begun up to
`trainer.max_staleness` steps before, with the weights of that time, as `buffer.py` admits them. At
a weight sync the engines pause, take the new weights, compute the keys and values of unfinished
responses again, and go on with these responses; each token has the version of its weights. The
trainer computes the log-probabilities that the losses compare with, from the weights that the step
begins with, whichever weights drew the tokens.

With `trainer.max_staleness=0` nothing is begun before its step, and all numbers are those of
`on_policy.py`, bit for bit.

A checkpoint keeps which prompts the engines were answering; a resumed run generates them again, so
that no prompt is lost and none is trained on twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.loop.agreement import sync_first_weights
from mcore_rl.loop.buffer import Buffer
from mcore_rl.loop.checkpoints import Checkpoints
from mcore_rl.loop.collect import Draws, collect_groups
from mcore_rl.loop.evaluate import evaluate
from mcore_rl.loop.generate import Asked
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.log import open_log, performance, with_times
from mcore_rl.loop.step import Learner, is_due, is_validated
from mcore_rl.loop.stop import Stop
from mcore_rl.metrics import Metrics, maximum, merge
from mcore_rl.observability.samples import SampleLog
from mcore_rl.types import SampleGroup


def train(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, run_dir: Path, stop: Stop) -> None:
    """Train to the last step or, by StoppedError, until asked to end; from the run folder's latest
    checkpoint if it has one."""
    trainer, total_steps = cfg.trainer, inputs.total_steps
    learner, ahead = Learner(cfg, cluster), Ahead(cfg, inputs, cluster)
    resumed_parts = {
        "prompts": inputs.prompts,
        "kl": learner.kl,
        "ledger": ahead.ledger,
        "ahead": ahead,
    }
    checkpoints = Checkpoints(trainer, run_dir, cluster, resumed_parts)
    start = checkpoints.resume()
    samples = SampleLog(run_dir, start, trainer.log_val_generations, inputs.token_texts)

    sync_first_weights(cfg, inputs, cluster, start)
    ahead.begin(start, total_steps)

    with open_log(trainer, run_dir, start, total_steps) as log, stop.saves(checkpoints):
        for step in range(start, total_steps):
            cluster.enter_step(step)
            checkpoints.begin_step(step)
            stop.check()
            metrics: list[Metrics] = [ahead.admit()]
            if is_validated(cfg, step):
                with log.stage("eval"):
                    metrics.append(evaluate(cfg, inputs, cluster, step, samples))
            groups, rollout_metrics = collect_groups(cfg, inputs, ahead, step, log)
            groups, learned = learner.prepare(groups, log)
            samples.log(step, "train", groups)
            stop.check()
            checkpoints.begin_updates()  # from here on the step is finished
            metrics += [rollout_metrics, *learned, *learner.update(step, groups, log)]
            metrics.append(age_in_updates(cfg, step, groups))
            ahead.ledger.trained(groups)
            with log.stage("weight_sync"):
                metrics.append(cluster.engines.sync_weights(version=step + 1))
            ahead.published(step + 1)
            metrics.append(ahead.ledger.balance())
            metrics.append(performance(cluster))
            log.log(step, with_times(merge(metrics), log.times()))
            is_last = step + 1 == total_steps or stop.is_asked
            if is_last or is_due(step + 1, trainer.save_freq):
                with log.stage("checkpoint"):
                    checkpoints.save(step + 1)

        if inputs.val_prompts:
            with log.stage("eval"):
                eval_metrics = evaluate(cfg, inputs, cluster, total_steps, samples)
            log.log(total_steps, merge([eval_metrics, log.times()]))
        checkpoints.finish()


def age_in_updates(cfg: RunConfig, step: int, groups: Sequence[SampleGroup]) -> Metrics:
    """Return the most optimizer updates between the oldest weights that drew a token and the
    weights of the step's last update."""
    per_step = cfg.data.train_batch_size // cfg.actor.ppo_mini_batch_size * cfg.actor.ppo_epochs
    oldest = min(sample.weight_version for group in groups for sample in group.samples)
    updates = (step - oldest) * per_step + per_step - 1
    return {"rollout/staleness/updates_max": maximum(float(updates))}


@dataclass(frozen=True, slots=True)
class _Admitted:
    """The first draw of a step."""

    prompts_before: Mapping[str, Any]
    """Position of the stream of prompts before the draw."""
    asked: Asked


class Ahead(Draws):
    """Draws where the first draw of a step begins before the step. Further draws, needed if groups
    are filtered, begin when the need is known."""

    def __init__(self, cfg: RunConfig, inputs: RunInputs, cluster: Cluster) -> None:
        super().__init__(cfg, inputs, cluster)
        self._again: list[Mapping[str, Any]] = []
        self._buffer = self._empty_buffer(0, 0)

    def begin(self, step: int, end: int) -> None:
        """Begin with `step`, whose weights all engines have; `end` is the first step not done."""
        self._buffer = self._empty_buffer(step, end)

    def admit(self) -> Metrics:
        """Start all generations that the buffer admits; return how much the engines work on."""
        while (step := self._buffer.to_admit) is not None:
            stream = self._inputs.prompts
            before = stream.state_dict()
            if self._again:  # the engines worked on it when the resumed run ended
                now, before = before, self._again.pop(0)
                stream.load_state_dict(before)
                prompts = self._next_prompts()
                stream.load_state_dict(now)
            else:
                prompts = self._next_prompts()
            self._buffer.admit(_Admitted(before, self._ask(step, 0, prompts)))
        num_prompts = sum(len(work.asked.prompts) for work in self._buffer.works)
        return {
            "rollout/in_flight/prompts": maximum(float(num_prompts)),
            "rollout/in_flight/samples": maximum(float(num_prompts * self._cfg.rollout.n)),
        }

    def draw(self, step: int, number: int) -> list[SampleGroup]:
        """See `Draws`."""
        if number > 0:
            return super().draw(step, number)
        return self._answered(step, self._buffer.take(step).asked, self._enough)

    def published(self, version: int) -> None:
        """Take note that all engines have the weights of a version."""
        self._buffer.published(version)

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position before each draw that is not yet trained on."""
        pending = [work.prompts_before for work in self._buffer.works]
        return {"pending": [dict(before) for before in [*pending, *self._again]]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Repeat these draws, before any other."""
        self._again = [dict(before) for before in state["pending"]]

    def _empty_buffer(self, step: int, end: int) -> Buffer[_Admitted]:
        return Buffer(step, end, self._cfg.trainer.max_staleness)
