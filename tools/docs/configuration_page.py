"""The reference of the configuration: a table for each section, from the dataclasses.

A field's meaning is the docstring under it, its default the one that the class has. Sections whose
options depend on a choice get a table for each choice that has options.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from mcore_rl.algorithms.advantages import ADVANTAGES
from mcore_rl.algorithms.losses import POLICY_LOSSES
from mcore_rl.algorithms.losses.base import ClipConfig
from mcore_rl.config.run import RunConfig, SftRunConfig
from mcore_rl.registry import Registry

HEAD = """# Configuration

Every key of `mcore_rl.train`, with its type, its default and its meaning. This page is generated
from the dataclasses. A recipe of `configs/` sets some of these keys, the command line sets more.
`--cfg job` prints the result. A default of `null` means: not set; what holds then stands beside it.

`mcore_rl.sft` reads `data`, `model`, `trainer` and, of `actor`, the keys that are not about
reinforcement learning: {sft}.
"""

CHOICES: dict[str, Registry[Any]] = {"actor": POLICY_LOSSES, "algorithm": ADVANTAGES}
"""Sections with options of what is chosen in them."""


def page() -> str:
    """Return the page."""
    text = HEAD.format(sft=", ".join(f"`{key}`" for key in _sft_keys()))
    for section, cls in _sections(RunConfig):
        text += f"\n## {section}\n\n{_first_paragraph(cls)}\n\n"
        text += _table(section, cls)
        for choice, config in _options(section):
            text += f"\n### {section}: options of {choice}\n\n{_first_paragraph(config)}\n\n"
            text += _table(section, config)
    return text


def field_meanings(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass that has one, those of its bases too."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            meanings |= dict(_written_under(base))
    return meanings


def _written_under(cls: type) -> Iterator[tuple[str, str]]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    for line, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            yield line.target.id, " ".join(following.value.value.split())


def _sections(cls: type, above: str = "") -> Iterator[tuple[str, type]]:
    """Yield the sections under a root by name, each before those within it."""
    for field in fields(cls):
        kind = _type(cls, field)
        if isinstance(kind, type) and is_dataclass(kind):
            yield above + field.name, kind
            yield from _sections(kind, f"{above}{field.name}.")


def _options(section: str) -> Iterator[tuple[str, type]]:
    """Yield names and options of what can be chosen in a section; of choices with the same options
    all names together."""
    if section not in CHOICES:
        return
    registry = CHOICES[section]
    by_class: dict[type, list[str]] = {}
    for name in registry:
        by_class.setdefault(registry.get(name).config, []).append(name)
    for config, names in by_class.items():
        if fields(config):
            yield ", ".join(names), config


def _table(section: str, cls: type) -> str:
    meanings = field_meanings(cls)
    rows = [
        f"| `{section}.{field.name}` | {_type_name(cls, field)} | `{_default(field)}` "
        f"| {_cell(meanings.get(field.name, ''))} |"
        for field in fields(cls)
        if not is_dataclass(_type(cls, field)) and field.init
    ]
    if not rows:
        return ""
    return "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _sft_keys() -> list[str]:
    kinds = dict(_sections(SftRunConfig))
    actor = [f.name for f in fields(kinds["actor"]) if not is_dataclass(_type(kinds["actor"], f))]
    return [*(f"actor.{name}" for name in actor), "actor.optim", "actor.megatron"]


def _type(cls: type, field: Field[Any]) -> Any:
    return get_type_hints(cls)[field.name]


def _type_name(cls: type, field: Field[Any]) -> str:
    kind = _type(cls, field)
    if kind is Any:
        return "text or list" if field.name.endswith(("files", "modules")) else "any"
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return text.replace("typing.", "").replace(" | None", "").replace("|", "or")


def _default(field: Field[Any]) -> str:
    value = field.default
    if field.default_factory is not MISSING:
        value = field.default_factory()
    shown = {None: "null", True: "true", False: "false"}
    if isinstance(value, str):
        return value or '""'
    return shown[value] if value is None or isinstance(value, bool) else str(value)


def _first_paragraph(cls: type) -> str:
    """Return it, with the bounds that a loss that clips has unless they are set."""
    text = " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
    if issubclass(cls, ClipConfig):
        text += f" Unless they are set: {cls.LOW} downwards, {cls.HIGH} upwards."
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
