"""A few samples of each step and of each validation, for a person to read: `samples.jsonl`.

Chosen by position, never at random, so that the file is the same in a repeated run. A line:

    {"step": 3, "split": "train", "uid": "train.parquet:17", "index": 2,
     "prompt": "37+48=", "response": "85", "ground_truth": "85", "finish_reason": "stop",
     "reward": 1.0, "reward_status": "scored", "answer": "85", "reward_parts": {"acc": 1.0},
     "versions": [[3, 0, 3]], "num_tokens": 3,
     "tokens": {"texts": ["8", "5", "<|im_end|>"],
                "rollout_logprobs": [-0.1, -0.6, -0.02], "logprob_diffs": [1e-07, -2e-07, 0.0],
                "advantages": {"values": [0.71], "counts": [3]}}}

`versions` are [weight version, first token, end] as in `VersionSpan`. `tokens` holds the first
MAX_TOKENS tokens of the response. `logprob_diffs` is what the trainer gave a token before the
step's updates minus what the engine gave it, null where the trainer did not compute it: in
validations, and in a step of a single update. `advantages` are runs of tokens that have one value:
the values, and how many tokens have each; null in validations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mcore_rl.observability.jsonl import StepFile
from mcore_rl.observability.run_folder import SAMPLES_FILE
from mcore_rl.types import Ids, Numbers, Sample, SampleGroup

MAX_TOKENS = 512
"""Response tokens whose numbers are written."""


class SampleLog:
    """Writes samples spread evenly over the groups of a step or of its validation.

    Args:
        run_dir: the run's folder.
        start_step: first step that this run does; later lines of an earlier run are dropped.
        samples_per_step: how many at most, of each of the two.
        token_texts: the text of each of some tokens.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        samples_per_step: int,
        token_texts: Callable[[Ids], list[str]],
    ) -> None:
        self._file = StepFile(run_dir / SAMPLES_FILE, start_step)
        self._samples_per_step = samples_per_step
        self._token_texts = token_texts

    def log(self, step: int, split: str, groups: Sequence[SampleGroup]) -> None:
        """Append this step's choice.

        Args:
            step: whose weights drew the samples.
            split: of the data, "train" or "val", for the reader.
            groups: to choose from, with all fields known so far.

        Raises:
            RunError: if the file cannot be written.
        """
        samples = [sample for group in groups for sample in group.samples]
        num_chosen = min(self._samples_per_step, len(samples))
        for i in range(num_chosen):
            sample = samples[i * len(samples) // num_chosen]
            self._file.append({"step": step, "split": split, **self._record(sample)})

    def _record(self, sample: Sample) -> dict[str, Any]:
        prompt = sample.prompt
        return {
            "uid": prompt.uid,
            "index": sample.index,
            "prompt": prompt.text,
            "response": sample.response_text,
            "ground_truth": prompt.ground_truth,
            "finish_reason": sample.finish_reason,
            "reward": sample.reward,
            "reward_status": sample.reward_status,
            "answer": sample.answer,
            "reward_parts": dict(sample.reward_metrics),
            "versions": [[span.version, span.start, span.end] for span in sample.versions],
            "num_tokens": sample.num_response_tokens,
            "tokens": self._tokens(sample),
        }

    def _tokens(self, sample: Sample) -> dict[str, Any]:
        start = len(sample.prompt.token_ids)
        shown = slice(start, start + MAX_TOKENS)
        diffs = advantages = None
        if sample.old_logprobs is not None:
            diffs = _rounded((sample.old_logprobs - sample.rollout_logprobs)[shown], digits=3)
        if sample.advantages is not None:
            advantages = _runs(_rounded(sample.advantages[shown], digits=5))
        return {
            "texts": self._token_texts(sample.token_ids[shown]),
            "rollout_logprobs": _rounded(sample.rollout_logprobs[shown], digits=5),
            "logprob_diffs": diffs,
            "advantages": advantages,
        }


def _rounded(values: Numbers, digits: int) -> list[float]:
    """Return the values with so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


def _runs(values: Sequence[float]) -> dict[str, list[float]]:
    """Return the value of each run of equal values, and how long it is."""
    runs = [(value, len(list(run))) for value, run in itertools.groupby(values)]
    return {"values": [value for value, _ in runs], "counts": [count for _, count in runs]}
