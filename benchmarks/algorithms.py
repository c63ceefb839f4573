"""Every advantage estimator with every policy loss on the quickstart's task, as a table.

    make quickstart                         # the fine-tuned model and the data
    python benchmarks/algorithms.py         # all pairs, one after the other
    python benchmarks/algorithms.py --estimators grpo gpg --losses geo_mean --jobs 2

Each pair trains the fine-tuned model for the same number of steps with the settings of
`configs/quickstart.yaml`. The table has the greedy accuracy on held-out additions after that.
Pairs that the output folder holds already are not run again. Exit code 1 where one does not
improve.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from mcore_rl.algorithms.advantages import ADVANTAGES
from mcore_rl.algorithms.losses import POLICY_LOSSES

METRIC = "eval/arithmetic/accuracy"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("outputs/algorithms"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, two processes each")
    parser.add_argument("--estimators", nargs="+", default=ADVANTAGES.names())
    parser.add_argument("--losses", nargs="+", default=POLICY_LOSSES.names())
    args = parser.parse_args()

    pairs = list(product(args.estimators, args.losses))
    with ThreadPoolExecutor(args.jobs) as runs:
        curves = dict(zip(pairs, runs.map(lambda pair: run(args, *pair), pairs), strict=True))
    before = {curve[0] for curve in curves.values()}
    assert len(before) == 1, f"the runs began with different models: {sorted(before)}"
    print(f"\nAccuracy {before.pop():.3f} before, after {args.steps} steps:\n")
    print("| | " + " | ".join(f"`{loss}`" for loss in args.losses) + " |")
    print("|---" * (len(args.losses) + 1) + "|")
    for estimator in args.estimators:
        cells = " | ".join(f"{curves[estimator, loss][1]:.3f}" for loss in args.losses)
        print(f"| `{estimator}` | {cells} |")
    return int(any(after <= before for before, after in curves.values()))


def run(args: argparse.Namespace, estimator: str, loss: str) -> tuple[float, float]:
    """Train the pair unless that is done already; return the accuracy before and after."""
    folder = args.out / f"{estimator}_{loss}"
    metrics = folder / "metrics.jsonl"
    if not (metrics.exists() and args.steps in accuracies(metrics)):
        command = [
            *(sys.executable, "-m", "mcore_rl.train", "--config-name", "quickstart"),
            f"model.path={args.quickstart / 'sft' / 'hf_model'}",
            f"data.train_files={args.quickstart / 'data' / 'train.parquet'}",
            f"data.val_files={args.quickstart / 'data' / 'val.parquet'}",
            f"algorithm.adv_estimator={estimator}",
            f"actor.policy_loss.loss_mode={loss}",
            f"trainer.total_training_steps={args.steps}",
            f"trainer.default_local_dir={folder}",
            "trainer.save_freq=-1",
            "trainer.export_hf_model=false",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{estimator} + {loss}: {done.stderr.strip().splitlines()[-1]}")
    curve = accuracies(metrics)
    print(f"{estimator} + {loss}: {curve[0]:.3f} -> {curve[args.steps]:.3f}", flush=True)
    return curve[0], curve[args.steps]


def accuracies(metrics: Path) -> dict[int, float]:
    """Return the accuracy of each validated step."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return {line["step"]: line[METRIC] for line in lines if METRIC in line}


if __name__ == "__main__":
    sys.exit(main())
