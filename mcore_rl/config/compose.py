"""From the command line to a checked configuration object.

    python -m mcore_rl.train --config-name gmpo model.path=... actor.optim.lr=1e-6

Keys are checked against the typed tree before anything is composed, so a misspelt one stops with
the closest key that exists. The prefix `actor_rollout_ref.` of verl's keys means nothing more than
its absence, Hydra's signs `+` and `++` neither; `assignments.py` translates verl's other names.
Plug-ins are imported first, so that what they register can be chosen.

Options of a loss or an estimator are keys of the section in which it is chosen (`options.py`). The
recipe and the command line are composed on a tree that has those of all, still untyped; then the
ones of what is chosen get their types, and others are refused.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mcore_rl.config.assignments import Assignment, translate
from mcore_rl.config.environment import (
    ComposedConfig,
    find_references,
    node_of,
    put_references,
    without_values,
)
from mcore_rl.config.translate import TABLE, VERL_BASES, WILDCARD, Refused
from mcore_rl.errors import UserError, closest, closest_hint, require
from mcore_rl.options import ChoosingSection, option_names, options_read
from mcore_rl.plugins import import_plugins

Config = TypeVar("Config")

logger = logging.getLogger(__name__)

BASE = "base"
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_PREFIX = "actor_rollout_ref."
_BUILDS_ON_BASE = "_builds_on_base_"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What was asked for, before it is composed."""

    config_name: str
    config_dir: Path
    overrides: tuple[Assignment, ...]
    """In the names of this package."""
    warning: str
    """Names what the command line has and nothing here reads; "" if all is read."""
    show: bool
    """Print the resolved configuration and stop."""
    recipe: Mapping[str, Any] | None = None
    """What the recipe says, in place of a file; under `config_name`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def parse_command_line(program: str, description: str, argv: Sequence[str]) -> CommandLine:
    """Return the parsed arguments; `--help` prints and exits as usual.

    Raises:
        UserError: one line for an unknown option, or what is no `key=value`.
    """
    parser = _Parser(
        prog=program,
        description=description,
        epilog="Overrides are key=value pairs of the configuration: data.train_batch_size=64. "
        f"See all keys with: {program} --cfg job model.path=x data.train_files=x",
    )
    parser.add_argument("--config-name", "-cn", default=BASE, help="recipe, a file of --config-dir")
    parser.add_argument(
        "--config-dir",
        "--config-path",
        "-cd",
        default=None,
        help="folder of the recipe; that of the package unless given",
    )
    parser.add_argument("--cfg", choices=["job"], help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(list(argv))
    overrides, warning = parse_overrides(args.overrides)
    name = args.config_name.removesuffix(".yaml")
    return CommandLine(
        config_name=BASE if name in VERL_BASES else name,
        config_dir=Path(args.config_dir).resolve() if args.config_dir else _RECIPES,
        overrides=overrides,
        warning=warning,
        show=args.cfg is not None,
    )


def parse_overrides(texts: Iterable[str]) -> tuple[tuple[Assignment, ...], str]:
    """Return the assignments `key=value` in the names of this package, and a warning that names
    what nothing here reads.

    Raises:
        UserError: one line for what is no `key=value`.
    """
    overrides, warning = translate(map(_parse_override, texts))
    return tuple(overrides), warning


def compose_config(root: type[Config], line: CommandLine) -> Config:
    """Return the configuration object of type `root`, a subclass of `ComposedConfig`.

    Raises:
        UserError: one line for a missing recipe, an unknown key, a wrong type or a refused value.
    """
    import_plugins()
    schema = _with_all_options(root)
    ConfigStore.instance().store(name=BASE, node={_BUILDS_ON_BASE: True})
    overrides = [_checked_override(option, schema) for option in line.overrides]
    if line.recipe is not None:
        recipe = {"defaults": [BASE, "_self_"], **line.recipe}
        ConfigStore.instance().store(name=line.config_name, node=recipe)
    folder = _RECIPES  # which has none of the names that the store has
    if line.config_name != BASE and line.recipe is None:
        _check_recipe(line)
        folder = line.config_dir
    composed: Any = None
    try:
        with initialize_config_dir(str(folder), version_base=None):
            composed = _compose(line.config_name, overrides, schema)

            def value(option: Assignment) -> object:
                more = [*overrides, _checked_override(option, schema)]
                return OmegaConf.select(_compose(line.config_name, more, schema), option.key)

            _refuse_two_values(line.overrides, value)
        _type_options(composed, root)
        config: Any = OmegaConf.to_object(composed)
        config.references = find_references(composed)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        message = str(_one_line(error, schema))
        if composed is not None:
            message = without_values(message, composed)
        raise UserError(message) from error
    except (YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config-name {line.config_name}: {reason}.") from error
    assert isinstance(config, root)
    _check_finite(config, "")
    return config


def _compose(recipe: str, overrides: list[str], schema: DictConfig) -> DictConfig:
    """Return the recipe with the overrides, on the typed tree.

    Hydra has what is said and not the tree: it copies all that it has many times.

    Raises:
        UserError: if the recipe does not build on the tree.
    """

    def typed(overrides: list[str]) -> DictConfig:
        said = hydra_compose(recipe, overrides)
        OmegaConf.set_struct(said, False)
        if not said.pop(_BUILDS_ON_BASE, False):
            raise UserError(
                f"--config-name {recipe}: the recipe does not build on the typed tree. Begin it "
                "with `defaults: [base, _self_]`."
            )
        _refuse_other_sections(said, schema)
        return cast("DictConfig", OmegaConf.merge(schema, said))

    try:
        return typed(overrides)
    except (HydraException, OmegaConfBaseException):
        typed([])  # what is wrong with the recipe itself is said first
        raise


def _refuse_other_sections(said: DictConfig, schema: DictConfig, prefix: str = "") -> None:
    """Raise a UserError for a section that is set to a value, or a list set to a section: the
    messages of OmegaConf name no key."""
    for name in said:
        node, typed = node_of(said, name), node_of(schema, name)
        value = node._value()  # None, or the text of an interpolation, or what is there
        if value is None:
            continue
        kind = type(value).__name__
        is_section = isinstance(node, DictConfig) and isinstance(value, dict)
        wants_section = isinstance(typed, DictConfig) and not _is_untyped(typed)
        if is_section and wants_section:
            _refuse_other_sections(node, typed, f"{prefix}{name}.")
        elif wants_section or (is_section and isinstance(typed, ListConfig)):
            raise UserError(f"{prefix}{name}: Invalid type assigned: {kind}.")


def _refuse_two_values(
    options: Iterable[Assignment], value: Callable[[Assignment], object]
) -> None:
    """Raise a UserError if two names of one key say different things.

    Args:
        options: of several values of one name the last counts.
        value: returns what an option comes to, interpolations resolved.
    """
    said: dict[str, dict[str, Assignment]] = {}
    for option in options:
        said.setdefault(option.key, {})[option.source or option.key] = option
    for key, named in said.items():
        values = {str(option.value) for option in named.values()}
        if len(values) > 1 and any("${" in text for text in values):
            values = {str(value(option)) for option in named.values()}
        if len(values) > 1:
            names = " and ".join(named)
            raise UserError(f"{names} set {key} to different values. Leave one of them.")


def _sections(root: type) -> dict[str, type[ChoosingSection]]:
    """Return the sections of `root` in which something with options is chosen."""
    types = get_type_hints(root)
    return {
        field.name: types[field.name]
        for field in fields(root)
        if isinstance(types[field.name], type) and issubclass(types[field.name], ChoosingSection)
    }


def _with_all_options(root: type) -> DictConfig:
    """Return the typed tree with the options of all that can be chosen, each of them unset."""
    sections = _sections(root).items()
    return _schema(root, tuple((name, *option_names(s.REGISTRY)) for name, s in sections))


@functools.cache
def _schema(root: type, sections: tuple[tuple[str, ...], ...]) -> DictConfig:
    """Return the typed tree with options beside its fields, to be read only.

    Args:
        root: its type.
        sections: (name of a section, its options).
    """
    schema = OmegaConf.structured(root)
    for name, *options in sections:
        with open_dict(schema[name]):
            for option in options:
                schema[name][option] = MISSING
    return schema


def _type_options(composed: DictConfig, root: type) -> None:
    """Give the options of what is chosen in the composed tree their types; drop all others.

    Raises:
        UserError: for an option that is set and not read.
    """
    for name, section in _sections(root).items():
        registry = section.REGISTRY
        choice = OmegaConf.select(composed, registry.key)
        values: Any = OmegaConf.to_container(composed[name])
        options = {option: values.pop(option) for option in option_names(registry)}
        given = {option: value for option, value in options.items() if value != MISSING}
        values |= options_read(registry, choice, given)
        composed[name] = OmegaConf.structured(section.of(choice))
        with open_dict(composed[name]):  # dictionaries without types take any key
            composed[name].merge_with(values)


def _check_finite(node: Any, key: str) -> None:
    """Refuse NaN and infinity, which pass for a number in most comparisons, wherever they stand."""
    if isinstance(node, float):
        require(math.isfinite(node), key, node, "is not finite")
    below: Iterable[tuple[Any, Any]] = ()
    if is_dataclass(node):
        below = ((field.name, getattr(node, field.name)) for field in fields(node))
    elif isinstance(node, dict):
        below = cast("dict[Any, Any]", node).items()
    elif isinstance(node, list):
        below = enumerate(cast("list[Any]", node))
    for name, value in below:
        _check_finite(value, f"{key}.{name}".lstrip("."))


def to_yaml(config: ComposedConfig) -> str:
    """Return the configuration as YAML, resolved but for what came from the environment."""
    plain = _plain(config)
    put_references(plain, config.references)
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _plain(node: Any) -> Any:
    """Return a tree of dataclasses as one of dictionaries and lists that can be written to."""
    if is_dataclass(node):
        keys = [x.name for x in fields(node) if not x.metadata.get("omegaconf_ignore")]
        return {key: _plain(getattr(node, key)) for key in keys}
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in cast("dict[Any, Any]", node).items()}
    if isinstance(node, list):
        return [_plain(value) for value in cast("list[Any]", node)]
    return node


def _check_recipe(line: CommandLine) -> None:
    if not line.config_dir.is_dir():
        raise UserError(f"--config-dir {line.config_dir}: there is no such folder.")
    recipes = [path.stem for path in line.config_dir.glob("*.yaml")]
    if line.config_name not in recipes:
        raise UserError(
            f"--config-name {line.config_name}: there is no such recipe in {line.config_dir}."
            f"{closest_hint(line.config_name, recipes)} There are: {', '.join(sorted(recipes))}."
        )


def _parse_override(text: str) -> Assignment:
    text = text.replace(f"${{{_PREFIX}", "${")
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{text!r} is not of the form key=value ({reason}). Quote the value for both the shell "
            "and Hydra if it has signs: \"key='a,b'\"."
        ) from error
    if override.is_sweep_override():
        raise UserError(f"{text!r} is a sweep. Quote the value if the commas belong to it.")
    if override.type is OverrideType.DEL or override.package is not None:
        raise UserError(f"{text!r} changes which keys there are. Only key=value is taken.")
    key = override.key_or_group.removeprefix(_PREFIX)
    if not key:
        raise UserError(f"{text!r} is not of the form key=value: it has no key.")
    return Assignment(key, override.value(), text.split("=", 1)[1])


def _checked_override(option: Assignment, schema: DictConfig) -> str:
    """Return the assignment as Hydra wants it, with `++`: the key need not be in the recipe."""
    key = option.key
    if not _exists(key, schema):
        raise UserError(f"{key}: there is no such key.{_hint(key, schema)}")
    return f"++{key}={option.text}"


def _hint(key: str, schema: DictConfig) -> str:
    """Name the closest key, or option of verl's that is taken; "" if the closest one is refused."""
    options = [name for name in TABLE if not name.endswith(WILDCARD)]
    near = closest(key, [*_all_keys(schema), *options])
    row = TABLE.get(near or "")
    is_refused = isinstance(row, Refused) and not any(row.values.values())
    return "" if near is None or is_refused else f" Did you mean {near!r}?"


def _exists(key: str, schema: DictConfig) -> bool:
    """Whether `key` is in the tree; anything goes below an untyped dictionary."""
    return _find(key, schema) is not None


def _find(key: str, schema: DictConfig) -> Any:
    """Return the node of `key`, or the untyped dictionary that it is below; None without either."""
    node: Any = schema
    for part in key.split("."):
        if _is_untyped(node):
            break
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118  # unset too
            return None
        node = node_of(node, part)
    return node


def _is_untyped(node: Any) -> bool:
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def _all_keys(schema: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in schema:
        node = node_of(schema, name)
        keys.append(f"{prefix}{name}")
        if isinstance(node, DictConfig):
            keys += _all_keys(node, f"{prefix}{name}.")
    return keys


def _one_line(error: Exception, schema: DictConfig) -> UserError:
    """Turn an error of Hydra or OmegaConf into one line that names the key."""
    cause: BaseException = error
    # Hydra hides the cause of an error in a recipe: it stands in the context alone.
    while inner := cause.__cause__ or (isinstance(cause, HydraException) and cause.__context__):
        cause = inner
    if isinstance(cause, UserError):
        return cause
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    reason = str(cause).splitlines()[0].rstrip(".")
    if not key:
        return UserError(f"{reason}.")
    hint = "" if _exists(key, schema) else closest_hint(key, _all_keys(schema))
    return UserError(f"{key}: {reason}.{hint}")
