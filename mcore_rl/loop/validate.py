"""`trainer.val_only`: one validation and nothing else.

It leaves a run that the folder holds as it is: what it finds is in a folder of its own.
"""

from __future__ import annotations

from pathlib import Path

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.loop.agreement import bring_weights
from mcore_rl.loop.checkpoints import Checkpoints
from mcore_rl.loop.evaluate import evaluate
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.log import open_log
from mcore_rl.metrics import merge
from mcore_rl.observability.samples import SampleLog


def validate(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, run_dir: Path) -> Path:
    """Validate the weights that the run would go on with; return the folder with what was found."""
    step = Checkpoints(cfg.trainer, run_dir, cluster, {}).load()
    folder = run_dir / "validation" / f"global_step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    samples = SampleLog(folder, step, cfg.trainer.log_val_generations)
    bring_weights(cfg, inputs, cluster, step)
    with open_log(cfg.trainer, folder, step, step) as log:
        with log.stage("eval"):
            metrics = evaluate(cfg, inputs, cluster, step, samples)
        log.log(step, merge([metrics, log.times()]))
    return folder
