"""On-policy training: one rollout, its updates, one weight sync, again.

This is the page to read first. A step takes prompts, lets the engines answer them with the weights
of version `step`, scores the answers, turns scores into advantages, trains on them in minibatches,
and gives the engines the new weights as version `step + 1`. What is logged as step s describes
weights s: the validation of s, the samples drawn with s, and the update that led from s to s + 1.
The last validation is logged as one more step, without an update.
"""

from __future__ import annotations

from pathlib import Path

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.loop.agreement import sync_first_weights
from mcore_rl.loop.checkpoints import Checkpoints
from mcore_rl.loop.collect import Draws, collect_groups
from mcore_rl.loop.evaluate import evaluate
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.log import open_log, performance, with_times
from mcore_rl.loop.step import Learner, is_due, is_validated
from mcore_rl.loop.stop import Stop
from mcore_rl.metrics import Metrics, merge
from mcore_rl.observability.samples import SampleLog


def train(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, run_dir: Path, stop: Stop) -> None:
    """Train to the last step or, by StoppedError, until asked to end; from the run folder's latest
    checkpoint if it has one."""
    trainer, total_steps = cfg.trainer, inputs.total_steps
    learner, draws = Learner(cfg, cluster), Draws(cfg, inputs, cluster)
    resumed_parts = {"prompts": inputs.prompts, "kl": learner.kl, "ledger": draws.ledger}
    checkpoints = Checkpoints(trainer, run_dir, cluster, resumed_parts)
    start = checkpoints.resume()
    samples = SampleLog(run_dir, start, trainer.log_val_generations, inputs.token_texts)

    sync_first_weights(cfg, inputs, cluster, start)

    with open_log(trainer, run_dir, start, total_steps) as log, stop.saves(checkpoints):
        for step in range(start, total_steps):
            cluster.enter_step(step)
            checkpoints.begin_step(step)
            stop.check()
            metrics: list[Metrics] = []
            if is_validated(cfg, step):
                with log.stage("eval"):
                    metrics.append(evaluate(cfg, inputs, cluster, step, samples))
            groups, rollout_metrics = collect_groups(cfg, inputs, draws, step, log)
            groups, learned = learner.prepare(groups, log)
            samples.log(step, "train", groups)
            stop.check()
            checkpoints.begin_updates()  # from here on the step is finished
            metrics += [rollout_metrics, *learned, *learner.update(step, groups, log)]
            draws.ledger.trained(groups)
            with log.stage("weight_sync"):
                metrics.append(cluster.engines.sync_weights(version=step + 1))
            metrics.append(draws.ledger.balance())
            metrics.append(performance(cluster))
            log.log(step, with_times(merge(metrics), log.times()))
            # Done after the log line, which a resumed run does not write again. So its time counts
            # in the next step.
            is_last = step + 1 == total_steps or stop.is_asked
            if is_last or is_due(step + 1, trainer.save_freq):
                with log.stage("checkpoint"):
                    checkpoints.save(step + 1)

        if inputs.val_prompts:
            with log.stage("eval"):
                eval_metrics = evaluate(cfg, inputs, cluster, total_steps, samples)
            log.log(total_steps, merge([eval_metrics, log.times()]))
        checkpoints.finish()
