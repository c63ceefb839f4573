"""What the processes of one layout do: logprobs, two updates on the minibatch, an export.

    python -m mcore_rl.verify.layout_run model.path=... trainer.default_local_dir=WORK/tp2 ...

The configuration, the launcher and the workers are those of a training run; the minibatch is read
from `WORK/minibatch.json`. The first layout that runs computes the old logprobs and writes them
into that file, so that all others are given the same minibatch to the last bit.

Both updates (`actor.ppo_epochs`) take the same minibatch: the second is the first to see updated
weights and the optimizer's moments. Nothing here compares (`compare.py` does).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mcore_rl.algorithms.objective import resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.config.run import RunConfig
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.metrics import to_floats
from mcore_rl.run.command import run_command
from mcore_rl.run.specs import start_cluster
from mcore_rl.types import Numbers, TokenSequence
from mcore_rl.verify.runs import check_sizes

MODULE = "mcore_rl.verify.layout_run"
METRICS_FILE = "metrics.json"
"""In the layout's folder: the metrics of each update."""
WEIGHTS_FOLDER = "weights"
"""In the layout's folder: the weights after the last update, as a Hugging Face checkpoint."""
_MINIBATCH_FILE = "minibatch.json"

_OLD_LOGPROB_SPREAD = 0.3
"""Of the noise on old logprobs, in nats: ratios on both sides of every loss's clip bounds."""


def write_minibatch(work: Path, sequences: Sequence[TokenSequence]) -> None:
    """Write the minibatch of all layouts."""
    rows = [
        {name: x.tolist() for name, x in asdict(sequence).items() if x is not None}
        for sequence in sequences
    ]
    text = json.dumps(rows)
    (work / _MINIBATCH_FILE).write_text(text, encoding="utf-8")


def read_minibatch(work: Path) -> list[TokenSequence]:
    """Return what `write_minibatch` wrote."""
    rows = json.loads((work / _MINIBATCH_FILE).read_text(encoding="utf-8"))
    return [TokenSequence(**row) for row in rows]


def run(cfg: RunConfig, workers: ChannelWorkers) -> None:
    """Train on the minibatch and leave metrics and weights in the layout's folder."""
    folder = Path(cfg.trainer.default_local_dir)
    sequences = read_minibatch(folder.parent)
    cluster = start_cluster(
        cfg,
        workers,
        total_steps=1,
        temperature=cfg.rollout.temperature,
        engine=None,
    )
    if sequences[0].old_logprobs is None:
        sequences = _with_old_logprobs(sequences, cluster.trainer.logprobs(sequences))
        write_minibatch(folder.parent, sequences)
    spec = resolve_objective(cfg.actor, cfg.data.max_response_length)
    objective = PolicyObjective(spec, log_entropy=cfg.actor.calculate_entropy)
    cluster.trainer.begin_step()
    updates = [cluster.trainer.update(sequences, objective) for _ in range(cfg.actor.ppo_epochs)]
    cluster.trainer.export_hf(str(folder / WEIGHTS_FOLDER))
    cluster.close()
    (folder / METRICS_FILE).write_text(
        json.dumps([to_floats(update) for update in updates]), encoding="utf-8"
    )


def _with_old_logprobs(
    sequences: Sequence[TokenSequence], logprobs: Sequence[Numbers]
) -> list[TokenSequence]:
    """Return the sequences with old logprobs near the given ones, the same in every call."""
    rng = random.Random(0)
    return [
        replace(
            sequence,
            old_logprobs=np.array(
                [
                    value + rng.gauss(0, _OLD_LOGPROB_SPREAD) if trains else 0.0
                    for value, trains in zip(
                        values.tolist(), sequence.loss_mask.tolist(), strict=True
                    )
                ],
                np.float32,
            ),
        )
        for sequence, values in zip(sequences, logprobs, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of every process of the layout."""
    run_command(
        MODULE,
        "Train on one minibatch; started by `mcore-rl verify layouts`.",
        sys.argv[1:] if argv is None else argv,
        RunConfig,
        check_sizes,
        run,
    )


if __name__ == "__main__":
    main()
