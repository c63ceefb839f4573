"""A few samples of each step and of each validation, for a person to read: `samples.jsonl`.

Chosen by position, never at random, so that the file is the same in a repeated run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mcore_rl.observability.jsonl import StepFile
from mcore_rl.observability.run_folder import SAMPLES_FILE
from mcore_rl.types import SampleGroup


class SampleLog:
    """Writes samples spread evenly over the groups of a step or of its validation.

    Args:
        run_dir: the run's folder.
        start_step: first step that this run does; later lines of an earlier run are dropped.
        samples_per_step: how many at most, of each of the two.
    """

    def __init__(self, run_dir: Path, start_step: int, samples_per_step: int = 4) -> None:
        self._file = StepFile(run_dir / SAMPLES_FILE, start_step)
        self._samples_per_step = samples_per_step

    def log(self, step: int, split: str, groups: Sequence[SampleGroup]) -> None:
        """Append this step's choice.

        Args:
            step: whose weights drew the samples.
            split: of the data, "train" or "val", for the reader.
            groups: to choose from.

        Raises:
            RunError: if the file cannot be written.
        """
        samples = [sample for group in groups for sample in group.samples]
        num_chosen = min(self._samples_per_step, len(samples))
        for i in range(num_chosen):
            sample = samples[i * len(samples) // num_chosen]
            self._file.append(
                {
                    "step": step,
                    "split": split,
                    "uid": sample.prompt.uid,
                    "prompt": sample.prompt.text,
                    "response": sample.response_text,
                    "reward": sample.reward,
                    "ground_truth": sample.prompt.ground_truth,
                    "finish_reason": sample.finish_reason,
                }
            )
