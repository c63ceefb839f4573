"""The trained model as a Hugging Face folder, at the end of a run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.durable_files import rename_whole


def export_model(cluster: Cluster, run_dir: Path) -> None:
    """Write the trained weights to `hf_model` in the run folder; the folder appears when whole.

    One that an earlier end of this same run wrote stays until then. Killed between two renames, the
    run leaves it as `hf_model.previous`, and the next call puts it back.
    """
    final, partial, previous = (run_dir / f"hf_model{end}" for end in ("", ".partial", ".previous"))
    if previous.exists() and not final.exists():
        previous.rename(final)
    for leftover in (partial, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    cluster.trainer.export_hf(str(partial))
    if final.exists():
        final.rename(previous)
    rename_whole(partial, final)
    shutil.rmtree(previous, ignore_errors=True)
    sys.stdout.write(f"model   {final}\n")
