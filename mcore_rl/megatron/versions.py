"""Which Megatron-Core this package runs with, and every difference between versions it knows of.

The package subclasses and replaces parts of Megatron-Core that are not its public interface, so it
names the versions whose tests it has passed and refuses others. A branch on a version number is
written here and nowhere else.

Known differences from 0.16.1 to 0.19.2: 0.19 builds latent attention otherwise, for which
`block_spec.py` has a class that leaves it as it was. A layer spec names its experts as a class and
its submodules in 0.16.1, and as one partial call in 0.19.2. What 0.16.1 gets wrong without CUDA or
Transformer Engine (see `cpu.py`) the later ones get wrong too, except for `te_general_gemm`, which
they define; that repair asks for the name.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

from packaging.version import Version

TESTED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""Versions of Megatron-Core that passed the CPU tests: the first on Python 3.11 and 3.12, the
others, which need 3.12, on that."""

# Flash attention takes fewer heads of keys than of queries in every torch from 2.11 on; the
# argument that says so is new in 2.12, and required from then on.
_GROUPS_ARE_NAMED = Version(version("torch")) >= Version("2.12.0")
GROUPED_FLASH_ARGUMENTS: dict[str, Any] = {"enable_gqa": True} if _GROUPS_ARE_NAMED else {}
"""Arguments of torch's `varlen_attn` beside keys with fewer heads than the queries."""


def with_experts(found: Any, experts: type) -> Any:
    """Return what a backend's `grouped_mlp_modules` found, with another class of experts."""
    if isinstance(found, partial):
        return partial(experts, *found.args, **found.keywords)
    _, submodules = found
    return experts, submodules


def require_supported_megatron() -> None:
    """Refuse a Megatron-Core outside the minor versions in `TESTED`.

    Raises:
        RuntimeError: if the installed one is older than the first or of a later minor version
            than the last.
    """
    found = version("megatron-core")
    newest = Version(TESTED[-1])
    if not (
        Version(TESTED[0]) <= Version(found) < Version(f"{newest.major}.{newest.minor + 1}.dev0")
    ):
        raise RuntimeError(
            f"megatron-core {found} is not supported: this package replaces internals of it and is"
            f" tested with {', '.join(TESTED)}. Install one of these."
        )
