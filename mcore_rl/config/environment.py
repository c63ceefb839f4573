"""What a configuration takes from the environment stays a reference wherever it is written.

    custom_reward_function.reward_kwargs.key=${oc.env:KEY}

The run gets the value of KEY; `--cfg job`, `config.yaml` and the report have `${oc.env:KEY}`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from omegaconf.resolvers import oc

Path: TypeAlias = tuple[str | int, ...]
"""Of a value: ("data", "train_files", 0)."""

_RESOLVER = "oc.env"
_VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)[^}]*\}")
_SURELY_A_VALUE = 8
"""Characters of a value that stands in no sentence by chance."""


@dataclass(kw_only=True, slots=True)
class ComposedConfig:
    """A root: the tree of keys, and what of it came from the environment."""

    references: dict[Path, str] = field(
        default_factory=dict[Path, str],
        compare=False,
        repr=False,
        metadata={"omegaconf_ignore": True},
    )
    """Not a key: the texts with references, by their place; `compose_config` sets them."""


def find_references(composed: Any) -> dict[Path, str]:
    """Return the text of every value that cannot be told without the environment."""
    OmegaConf.register_new_resolver(_RESOLVER, _hidden, replace=True)
    try:
        return dict(_found(composed, ()))
    finally:
        OmegaConf.register_new_resolver(_RESOLVER, oc.env, replace=True)


def put_references(plain: Any, references: Mapping[Path, str]) -> None:
    """Write them into a tree of dictionaries and lists in place of the values."""
    for (*above, last), text in references.items():
        node = plain
        for name in above:
            node = node[name]
        node[last] = text


def without_values(text: str, composed: Any) -> str:
    """Return a message with references in place of what they stand for in the configuration."""
    for found in _VARIABLE.finditer(OmegaConf.to_yaml(composed)):
        if value := os.environ.get(found[1]):
            text = text.replace(repr(value), repr(found[0]))
            if len(value) >= _SURELY_A_VALUE:
                text = text.replace(value, found[0])
    return text


def _hidden(*_: Any) -> Any:
    raise LookupError("the environment is not looked at")


def node_of(container: DictConfig | ListConfig, name: Any) -> Any:
    """Return what stands there before interpolation; OmegaConf has no public way to it."""
    return container._get_node(name)  # pyright: ignore[reportPrivateUsage]


def _found(node: DictConfig | ListConfig, path: Path) -> Iterator[tuple[Path, str]]:
    names = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for name in names:
        here: Path = (*path, name)
        child: Any = node_of(node, name)
        if child is not None and child._is_interpolation():
            try:
                child = child._dereference_node()
            except InterpolationResolutionError:
                yield here, child._value()
                continue
        if isinstance(child, DictConfig | ListConfig):
            with contextlib.suppress(TypeError):  # a container that is None or missing
                yield from _found(child, here)
