"""Where all generated samples went: generated = trained + discarded, by reason.

Samples are counted once when they come back from the engines. They are counted again when the
updates of a step have read them, or when they are discarded, with the reason. The two sides are
counted in different places, so a group that is lost or trained on twice is noticed. Samples that
engines still work on are not counted yet; they are logged separately. A resumed run goes on with
the ledger of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mcore_rl.errors import RunError
from mcore_rl.metrics import Metrics, maximum
from mcore_rl.types import SampleGroup

UNITS = ("prompts", "samples", "tokens")
"""Groups, samples and response tokens."""
_GENERATED, _TRAINED = "generated", "trained"
Counts = dict[str, int]


class Ledger:
    """Counts of a run since its first step."""

    def __init__(self) -> None:
        self._entries: dict[str, Counts] = {}

    def generated(self, groups: Sequence[SampleGroup]) -> None:
        """Enter groups that have come from the engines."""
        self._enter(_GENERATED, groups)

    def trained(self, groups: Sequence[SampleGroup]) -> None:
        """Enter groups that the updates of a step have read."""
        self._enter(_TRAINED, groups)

    def discarded(self, reason: str, groups: Sequence[SampleGroup]) -> None:
        """Enter groups that no update trains on.

        Args:
            reason: one word, for the metrics.
            groups: discarded.
        """
        self._enter(f"discarded/{reason}", groups)

    def balance(self) -> Metrics:
        """Return all counts so far, between two steps: `ledger/trained/tokens`,
        `ledger/discarded/alike/samples`.

        Raises:
            RunError: if the two sides differ.
        """
        found = self._entries.get(_GENERATED, _no_counts())
        used = [counts for name, counts in self._entries.items() if name != _GENERATED]
        for unit in UNITS:
            if found[unit] != sum(counts[unit] for counts in used):
                entries = ", ".join(f"{name} {c[unit]}" for name, c in self._entries.items())
                raise RunError(
                    f"the ledger does not balance, in {unit}: {entries}. A group was lost, or used "
                    "twice.",
                    role="controller",
                )
        return {
            f"ledger/{name}/{unit}": maximum(float(counts[unit]))
            for name, counts in self._entries.items()
            for unit in UNITS
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: dict(counts) for name, counts in self._entries.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on with the counts of a checkpoint."""
        self._entries = {name: dict(counts) for name, counts in state.items()}

    def _enter(self, name: str, groups: Sequence[SampleGroup]) -> None:
        if not groups:
            return
        counts = self._entries.setdefault(name, _no_counts())
        for group in groups:
            counts["prompts"] += 1
            counts["samples"] += len(group.samples)
            counts["tokens"] += sum(sample.num_response_tokens for sample in group.samples)


def _no_counts() -> Counts:
    return dict.fromkeys(UNITS, 0)
