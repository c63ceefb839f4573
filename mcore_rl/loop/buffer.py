"""Which steps the engines may generate for, so that no sample exceeds the bound on its age.

    admit(step) --take(step)--> being trained on --published(step + 1)--> its slot is free

A slot is taken when the generation for a step is admitted, and freed when the weights trained on
its samples are published. There are `max_staleness + 1` slots. So the generation for step s is
admitted only when the engines have weights s - max_staleness or newer. A sample may take any time,
and new weights may come meanwhile: every token of it is drawn with weights that are at most
`max_staleness` steps older than those that train on it. No sample is ever discarded because of its
age.

With `max_staleness=0` a step is admitted when all earlier ones are published: nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

Work = TypeVar("Work")


class Buffer(Generic[Work]):
    """The generations for coming steps, in the order of the steps.

    Args:
        step: the next one that trains, from weights of that version.
        end: the first step that is not done.
        max_staleness: how many steps the weights that draw a token may be older than the weights
            that train on it.
    """

    def __init__(self, step: int, end: int, max_staleness: int) -> None:
        self._published, self._end = step, end
        self._max_staleness = max_staleness
        self._works: dict[int, Work] = {}
        """Work that is admitted and not yet taken, by step."""
        self._next = step

    @property
    def to_admit(self) -> int | None:
        """The step to admit next; None if there is none or no slot is free."""
        is_free = self._next - self._published <= self._max_staleness
        return self._next if is_free and self._next < self._end else None

    @property
    def works(self) -> Sequence[Work]:
        """Work that is admitted and not yet taken, in the order of the steps."""
        return list(self._works.values())

    def admit(self, work: Work) -> None:
        """Take a slot for the step `to_admit`."""
        assert self.to_admit is not None, "no step may be admitted"
        self._works[self._next] = work
        self._next += 1

    def take(self, step: int) -> Work:
        """Return the work admitted for the step that trains now; its slot stays taken."""
        assert step == self._published, f"step {step} does not follow weights {self._published}"
        return self._works.pop(step)

    def published(self, version: int) -> None:
        """Free the slot of the step that produced these weights, which all engines now have."""
        assert version == self._published + 1, f"weights {version} after {self._published}"
        assert self._published not in self._works, f"step {self._published} trained on nothing"
        self._published = version
