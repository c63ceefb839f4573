"""What a loop asks of the engines: `engines.py` asks real ones, a replay answers from a journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mcore_rl.metrics import Metrics
from mcore_rl.rollout.base import GenerationRequest, GenerationResult


class Fleet(Protocol):
    """All engines of a run; see `Engines` for what is not said here."""

    @property
    def num_engines(self) -> int:
        """Engines that share the requests, without those that are started again."""
        ...

    @property
    def num_restarts(self) -> int:
        """How often engines were started again, in all."""
        ...

    @property
    def weights(self) -> Mapping[str, str]:
        """Short digest of each tensor that the last sync sent (`weight_sync/digest.py`)."""
        ...

    def generate(
        self, groups: Sequence[Sequence[GenerationRequest]], *, keep_routes: bool = False
    ) -> list[list[GenerationResult]]:
        """Return one result per request, in order."""
        return self.end(self.begin(groups, keep_routes=keep_routes))

    def begin(
        self, groups: Sequence[Sequence[GenerationRequest]], *, keep_routes: bool = False
    ) -> Any:
        """Give requests to the engines; return the argument for `end`."""
        ...

    def end(self, generation: Any, enough: int | None = None) -> list[list[GenerationResult]]:
        """Wait for a generation; once `enough` groups have ended, stop the rest. Return one result
        per request, in order."""
        ...

    def sync_weights(self, version: int) -> Metrics:
        """Give every engine the actor's weights as `version`."""
        ...

    def sync_and_compare(
        self, version: int, wanted: Sequence[Mapping[str, str]] | None = None
    ) -> int:
        """Do that, and compare the parameters that the engines have loaded; return how many."""
        ...

    def digests_of_model(self) -> list[dict[str, str]]:
        """Return digests of the parameters that the parts of an engine load from the model's
        folder."""
        ...

    def busy_share(self) -> float:
        """Return for how much of the time since the last call engines had requests."""
        ...

    def interrupt(self) -> None:
        """Abort generation, now and from now on."""
        ...
