"""An engine's side of update sessions: its receiver loads the updates, and it records the tensors.

Every engine has one for each of its receivers, in the process that loads:

    begin(version)  receive(update)*  differences(manifest) == []  end()

The tensors at the loader are compared with the exported ones before the engine accepts the weights:
engines' own loaders accept a session that lacks a projection or an expert.
"""

from __future__ import annotations

from typing import Any

from mcore_rl.errors import WeightSyncError
from mcore_rl.weight_sync.base import Link, Load, NamedTensors
from mcore_rl.weight_sync.digest import Manifest

_NUM_SHOWN = 5


class Intake:
    """Opens the receiver of a link.

    Args:
        link: brings the weights.
        load: loads them.
    """

    def __init__(self, link: Link, load: Load) -> None:
        self._receiver, self._load_into = link.open_receiver(), load
        self._is_open = False
        self._arrived = Manifest()

    def begin(self, version: int) -> None:
        """Prepare for the weights of a version."""
        self._arrived, self._is_open = Manifest(), True
        self._receiver.begin(version)

    def receive(self, update: Any) -> None:
        """Load the tensors of an update."""
        self._receiver.receive(update, self._load)

    def _load(self, tensors: NamedTensors) -> None:
        with self._arrived.adding(tensors):
            self._load_into(tensors)

    def differences(self, sent: Manifest) -> list[str]:
        """Return the errors in the arrived tensors, one line per tensor."""
        return sent.differences(self._arrived)

    def end(self) -> None:
        """Free what the session needed, whether it was finished or broke off."""
        if self._is_open:
            self._is_open = False
            self._receiver.end()

    def close(self) -> None:
        """Close the receiver."""
        self.end()
        self._receiver.close()


def refuse(differences: list[str], version: int) -> None:
    """Raise a WeightSyncError that names the tensors unless there are none."""
    if differences:
        shown = "; ".join(differences[:_NUM_SHOWN])
        more = len(differences) - _NUM_SHOWN
        shown += f"; and {more} more" if more > 0 else ""
        message = f"weights {version} are not what was sent: {shown}"
        raise WeightSyncError(message, role="rollout")
