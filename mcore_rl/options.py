"""Options of the choice in a section, as keys of that section.

`actor` has its own keys and those of the loss that `actor.policy_loss.loss_mode` names; `algorithm`
has its own keys and those of `algorithm.adv_estimator`. A loss or an estimator declares its options
as a dataclass where it is registered, so one that a user adds has options on the command line like
any other. Two choices may have options of the same name: they are never read together.

Example: of the section `actor`, whose loss is sapo with

    class SapoConfig:
        tau_pos: float = 1.0

`actor.tau_pos=1.5` is a key; with the loss vanilla it is refused, since nothing would read it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

from mcore_rl.errors import UserError, closest_hint
from mcore_rl.registry import Registry


class Choosable(Protocol):
    """An entry of a registry that has options."""

    @property
    def config(self) -> type:
        """Dataclass of its options, each with a default."""
        ...


@dataclass(kw_only=True, slots=True)
class NoOptions:
    """Options of a choice that has none."""


Section = TypeVar("Section", bound="ChoosingSection")


class ChoosingSection:
    """Base of a section in which one of a registry's entries is chosen.

    The class itself holds the keys of its own; `of` gives one that holds those of a choice too.
    """

    REGISTRY: ClassVar[Registry[Any]]

    @classmethod
    def choose(cls, name: str) -> dict[str, Any]:
        """Return the fields of the section that choose the entry `name`."""
        raise NotImplementedError

    @property
    def choice(self) -> str:
        """The name of the choice."""
        raise NotImplementedError

    @property
    def options(self) -> Any:
        """The options of the choice: an object of the dataclass that it was registered with."""
        config = self.REGISTRY.get(self.choice).config
        names = {option.name for option in fields(config)}
        own = {name: getattr(self, name) for name in _names(type(self)) if name in names}
        return config(**own)

    @classmethod
    def of(cls: type[Section], name: str, **values: Any) -> Section:
        """Return the section with the choice `name`.

        Args:
            name: of the registry.
            values: fields of the section, and options of the choice.

        Raises:
            UserError: for an option that the choice does not read, or that does not exist.
        """
        options = {key: value for key, value in values.items() if key not in _names(cls)}
        own = {key: value for key, value in values.items() if key in _names(cls)}
        entry: Choosable = cls.REGISTRY.get(name)
        return with_options(cls, entry.config)(
            **cls.choose(name), **own, **options_read(cls.REGISTRY, name, options)
        )


def options_read(registry: Registry[Any], choice: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options `given` that `choice` reads.

    An option of another choice may be there at its default, which asks for nothing.

    Raises:
        UserError: for any other option; the text names the closest if there is none of that name.
    """
    section = registry.key.split(".")[0]
    read, owners = {}, _owners(registry)
    for name, value in given.items():
        if name in _names(registry.get(choice).config):
            read[name] = value
        elif name not in owners:
            raise UserError(f"{section}.{name}: there is no such key.{closest_hint(name, owners)}")
        elif all(value != default for default in owners[name]):
            raise UserError(
                f"{section}.{name}={value!r} is not read with {registry.key}={choice}. Remove it."
            )
    return read


def option_names(registry: Registry[Any]) -> list[str]:
    """Return the options of all entries, sorted."""
    return sorted(_owners(registry))


def check_options(name: str, config: type) -> None:
    """Raise a ValueError unless `config` can hold the options of the entry `name`."""
    if not (is_dataclass(config) and isinstance(config, type)):
        raise ValueError(f"the options of {name!r} are no dataclass: {config!r}")
    for option in fields(config):
        if option.default is MISSING and option.default_factory is MISSING:
            raise ValueError(f"the option {option.name!r} of {name!r} has no default")


@functools.cache
def with_options(section: type[Section], config: type) -> type[Section]:
    """Return the class of a section that has the fields of `config` too.

    Raises:
        UserError: if the section has something of that name.
    """
    types = get_type_hints(config)
    for option in fields(config):
        if hasattr(section, option.name) or option.name in _names(section):
            raise UserError(
                f"{config.__name__}.{option.name} has the name of something that every "
                f"{section.__name__} has. Give the option another."
            )
    added = [
        (x.name, types[x.name], field(default=x.default, default_factory=x.default_factory))
        for x in fields(config)
    ]
    return make_dataclass(section.__name__, added, bases=(section,), kw_only=True)


def _owners(registry: Registry[Any]) -> dict[str, list[Any]]:
    """Return each option of a registry with its defaults, one for each entry that has it."""
    defaults: dict[str, list[Any]] = {}
    for entry in map(registry.get, registry):
        for option in fields(entry.config):
            factory = option.default_factory
            default = option.default if factory is MISSING else factory()
            defaults.setdefault(option.name, []).append(default)
    return defaults


def _names(config: type) -> set[str]:
    return {option.name for option in fields(config)}
