"""Checks on the answers of any engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import VersionSpan


def check_results(
    requests: Sequence[GenerationRequest], answers: Sequence[GenerationResult], versions: range
) -> None:
    """Return if the answers of an engine are possible.

    Args:
        requests: given to the engine.
        answers: one for each, in order.
        versions: of the weights that the engine can have had meanwhile.

    Raises:
        RolloutError: if an answer is impossible; it says why.
    """

    def refuse(what: str) -> None:
        raise RolloutError(f"the engine answered {what}", role="rollout")

    if len(answers) != len(requests):
        refuse(f"{len(requests)} requests with {len(answers)} results")
    for request, result in zip(requests, answers, strict=True):
        num, most = len(result.token_ids), request.sampling.max_tokens
        if result.finish_reason not in ("stop", "length", "abort"):
            refuse(f"with a response that ended by {result.finish_reason!r}")
        if not (num > 0 or result.finish_reason == "abort") or num > most:
            refuse(f"with {num} tokens where 1 to {most} were asked for")
        if not _are_whole(result.versions, num, versions):
            spans = [(span.version, span.start, span.end) for span in result.versions]
            wanted = " to ".join(map(str, sorted({versions[0], versions[-1]})))
            refuse(f"{num} tokens of the weights {spans}, not {wanted}")
    if not any(len(result.token_ids) for result in answers):
        return
    if np.concatenate([result.token_ids for result in answers]).min() < 0:
        refuse("with a token below 0")
    logprobs = np.concatenate([result.logprobs for result in answers])
    if not (np.isfinite(logprobs).all() and logprobs.max() <= 1e-3):
        refuse("with log-probabilities that are NaN or above 0")


def _are_whole(spans: Sequence[VersionSpan], num_tokens: int, versions: range) -> bool:
    """Return whether the spans cover all tokens without a gap, each with newer weights than the one
    before, and with versions in `versions`."""
    starts = [0, *(span.end for span in spans)]
    found = [span.version for span in spans]
    return (
        [span.start for span in spans] == starts[:-1]
        and starts[-1] == num_tokens
        and all(span.start < span.end for span in spans)
        and found == sorted(set(found))
        and all(version in versions for version in found)
    )
