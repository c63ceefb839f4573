"""Repositories of the Hugging Face hub, read from its cache on this machine.

They are downloaded only with HF_HUB_OFFLINE=0, and of a repository only the files that are asked
for; no code of theirs is ever run. Several processes of a machine may ask at once: the hub's
library locks each file, so one process downloads it while the others wait.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_YES = ("1", "ON", "YES", "TRUE")
"""Values that the hub's library reads as true."""


class NotThereError(LookupError):
    """The cache, or the hub, does not have what was asked for."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.reason, self.fix = reason, fix


def is_hub_name(name: str) -> bool:
    """Return whether it has the form `organisation/name`."""
    return _NAME.fullmatch(name) is not None


def is_same_repository(one: object, other: object) -> bool:
    """Return whether both are `organisation/name@commit`, and only the commit differs."""
    name, _, commit = str(one).partition("@")
    return bool(commit) and is_hub_name(name) and str(other).startswith(f"{name}@")


def may_download() -> bool:
    """Return whether HF_HUB_OFFLINE=0 is set."""
    return os.environ.get("HF_HUB_OFFLINE", "1").upper() not in _YES


def fetch(
    name: str,
    patterns: Sequence[str],
    *,
    kind: str,
    revision: str | None = None,
    download: bool = True,
) -> Path:
    """Return the folder of a repository in the cache, with those of its files that match.

    Args:
        name: organisation/name.
        patterns: of the files, as in a shell; `*` matches a slash too.
        kind: "model" or "dataset".
        revision: branch, tag or commit; None: the main branch.
        download: False: do not ask the hub whatever HF_HUB_OFFLINE says.

    Raises:
        NotThereError: if it is not in the cache and must not or cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    what = f"such {'data set' if kind == 'dataset' else kind}"
    is_local = not (download and may_download())
    try:
        folder = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=is_local,
        )
    except (OSError, HFValidationError) as error:
        if is_local:
            raise NotThereError(
                f"the cache of the Hugging Face hub has no {what}",
                "Check the name, or set HF_HUB_OFFLINE=0 to have it downloaded.",
            ) from None
        raise NotThereError(
            f"the Hugging Face hub gives no {what} ({str(error).splitlines()[0]})",
            "Check the name, the network, and whether it asks for a login.",
        ) from None
    return Path(folder)
