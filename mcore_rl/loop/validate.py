"""`trainer.val_only`, and `mcore-rl eval`: one validation and nothing else.

It does not change a run in the same folder: its results go to a folder of their own, with the
configuration, all metrics with their intervals, and every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.compose import to_yaml
from mcore_rl.config.run import RunConfig
from mcore_rl.durable_files import write_whole
from mcore_rl.loop.agreement import sync_first_weights
from mcore_rl.loop.checkpoints import Checkpoints
from mcore_rl.loop.evaluate import positions_by_source, validation_groups, validation_metrics
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.log import open_log
from mcore_rl.metrics import Metrics, merge, to_floats
from mcore_rl.observability.results import Estimate, SourceResults, write_results, write_samples
from mcore_rl.observability.run_folder import CONFIG_FILE
from mcore_rl.observability.samples import SampleLog
from mcore_rl.rewards.at_k import LEVEL, NUM_RESAMPLES, bootstrap_intervals
from mcore_rl.types import SampleGroup


def validate(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, run_dir: Path) -> Path:
    """Validate the weights that the run would resume with; return the folder with the results."""
    step = Checkpoints(cfg.trainer, run_dir, cluster, {}).load()
    folder = run_dir / "validation" / f"global_step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    samples = SampleLog(folder, step, cfg.trainer.log_val_generations, inputs.token_texts)
    sync_first_weights(cfg, inputs, cluster, step)
    with open_log(cfg.trainer, folder, step, step) as log:
        with log.stage("eval"):
            groups = validation_groups(cfg, inputs, cluster, step, samples)
            by_group = validation_metrics(groups)
        log.log(step, merge([*by_group, log.times()]))
    write_whole(folder / CONFIG_FILE, to_yaml(cfg))
    write_samples(folder, step, groups)
    interval = f"{LEVEL:.0%}, by {NUM_RESAMPLES} resamples of the prompts"
    write_results(folder, step, interval, _results(groups, by_group))
    return folder


def _results(
    groups: Sequence[SampleGroup], by_group: Sequence[Metrics]
) -> dict[str, SourceResults]:
    """Return the results by data source.

    Args:
        groups: scored.
        by_group: the metrics of each group; all of them are means.
    """
    results: dict[str, SourceResults] = {}
    for source, positions in positions_by_source(groups).items():
        rows = [by_group[i] for i in positions]
        values = to_floats(merge(rows))
        sums = np.array(
            [[float(row[k].value) if k in row else 0.0 for k in values] for row in rows]
        )
        weights = np.array(
            [[float(row[k].weight) if k in row else 0.0 for k in values] for row in rows]
        )
        low, high = bootstrap_intervals(sums, weights)
        numbers = zip(values.values(), low.tolist(), high.tolist(), strict=True)
        results[source] = SourceResults(
            num_prompts=len(rows),
            num_samples=sum(len(groups[i].samples) for i in positions),
            metrics=dict(zip(values, (Estimate(*row) for row in numbers), strict=True)),
        )
    return results
