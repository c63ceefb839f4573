"""Values as text between processes that do not trust each other: plain data, never objects.

A value is written as JSON that keeps its type: numbers, texts, booleans and None as they are, all
else as [type, content]. What subclasses one of the types is written as that type; what is none of
them is refused. So what is read back is of exactly these types, whatever the writer had in mind:
nothing in it can answer to `==` as it likes.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, KeysView, Mapping, ValuesView
from collections.abc import Set as AbstractSet

TYPE_CHECKING = False  # importing `typing` takes longer than all the rest
if TYPE_CHECKING:
    from typing import Any

_LONGEST_DIGITS = 4000
"""Of an integer in decimal; Python refuses to read more than 4,300."""
_LARGEST = 10**_LONGEST_DIGITS


def encode(value: Any) -> Any:
    """Return `value` as JSON.

    Raises:
        TypeError: if it, or something in it, is no plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -_LARGEST < value < _LARGEST else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if type(value).__module__.partition(".")[0] == "numpy":
        return encode(value.tolist())
    for kind, (type_of_kind, write, _) in _KINDS.items():
        if isinstance(value, type_of_kind):
            return [kind, write(value)]
    for kind, (module, write, _) in _LIBRARY_KINDS.items():
        type_of_kind = getattr(sys.modules.get(module), kind, ())
        if isinstance(value, type_of_kind):
            return [kind, write(value)]
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(content: Any) -> Any:
    """Return the value that `encode` wrote.

    Raises:
        ValueError, TypeError, ArithmeticError, KeyError: if that is not what it is.
    """
    if not isinstance(content, list):
        return content
    kind, inner = content
    if kind in _LIBRARY_KINDS:
        module, _, read = _LIBRARY_KINDS[kind]
        return read(getattr(importlib.import_module(module), kind), inner)
    return _KINDS[kind][2](inner)


def is_same(value: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether two values are equal by `==`, except that True and False are not numbers.

    Args:
        value: any.
        expected: any.
        tolerance: greatest difference, absolute or relative to it, of a number from a float that
            is expected.
    """
    value, expected = _as_python(value), _as_python(expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return type(value) is type(expected) and value == expected
    if isinstance(expected, float) and isinstance(value, int | float) and tolerance:
        return value == expected or _is_close(value, expected, tolerance)
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        pairs = zip(value, expected, strict=False)
        return (
            type(value) is type(expected)
            and len(value) == len(expected)
            and all(is_same(one, other, tolerance) for one, other in pairs)
        )
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            is_same(value[key], expected[key], tolerance) for key in expected
        )
    return value == expected


def _as_python(value: Any) -> Any:
    """Return a single number of numpy as Python's."""
    is_number = type(value).__module__ == "numpy" and value.shape == ()
    return value.item() if is_number else value


def _is_close(value: float, expected: float, tolerance: float) -> bool:
    try:
        return math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer beyond the floats
        return False


def _encode_all(values: Any) -> list[Any]:
    return [encode(value) for value in values]


def _encode_items(mapping: Mapping[Any, Any]) -> list[Any]:
    return [[encode(key), encode(value)] for key, value in mapping.items()]


def _decode_all(contents: list[Any]) -> list[Any]:
    return [decode(content) for content in contents]


# Kind: (what is written so, how it is written, how it is read). A kind comes before the type that
# it is a kind of.
_KINDS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "int": ((), hex, lambda text: int(text, 16)),
    "list": (list, _encode_all, _decode_all),
    "tuple": (tuple, _encode_all, lambda content: tuple(_decode_all(content))),
    "dict": (
        Mapping,
        _encode_items,
        lambda items: {decode(key): decode(value) for key, value in items},
    ),
    "frozenset": (frozenset, _encode_all, lambda content: frozenset(_decode_all(content))),
    "iterator": (
        (Iterator, KeysView, ValuesView),
        _encode_all,
        lambda content: iter(_decode_all(content)),
    ),
    "set": (AbstractSet, _encode_all, lambda content: set(_decode_all(content))),
    "deque": (deque, _encode_all, lambda content: deque(_decode_all(content))),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda ends: range(*ends)),
    "bytes": (bytes | bytearray, lambda content: content.hex(), bytes.fromhex),
    "complex": (complex, lambda z: [z.real, z.imag], lambda parts: complex(*parts)),
}

# Kinds of the library, which only those who use them have loaded: (module, how it is written, how
# it is read by the type). A date and time is a date, so it comes first.
_LIBRARY_KINDS: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "Decimal": ("decimal", str, lambda kind, text: kind(text)),
    "Fraction": (
        "fractions",
        lambda ratio: [encode(ratio.numerator), encode(ratio.denominator)],
        lambda kind, parts: kind(*_decode_all(parts)),
    ),
    "datetime": ("datetime", str, lambda kind, text: kind.fromisoformat(text)),
    "date": ("datetime", str, lambda kind, text: kind.fromisoformat(text)),
    "time": ("datetime", str, lambda kind, text: kind.fromisoformat(text)),
    "timedelta": (
        "datetime",
        lambda span: [span.days, span.seconds, span.microseconds],
        lambda kind, parts: kind(*parts),
    ),
}
