"""Reference answers of rows: how a reward reads them, and one line for a row it cannot read.

A list is any of its answers. A whole float is that integer: a column of integers with a missing
value comes as floats.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

Reference = TypeVar("Reference")
Function = TypeVar("Function", bound=Callable[..., Any])

_READERS: dict[Callable[..., Any], Callable[..., object]] = {}


def reads(reader: Callable[..., object]) -> Callable[[Function], Function]:
    """Return a decorator that declares how a reward reads a row.

    Args:
        reader: takes `ground_truth`, then the sandbox's section if the reward takes it; raises a
            ValueError if no answer can match. Every row is read before the run starts.
    """

    def decorate(function: Function) -> Function:
        _READERS[function] = reader
        return function

    return decorate


def reader_of(function: Callable[..., Any]) -> Callable[..., object] | None:
    """Return the function that `function` reads a row with; None if it declares none."""
    return _READERS.get(function)


def any_of(ground_truth: Any, read: Callable[[Any], Reference]) -> list[Reference]:
    """Return the acceptable answers of a row: what `read` makes of each in a list, or of the one.

    Raises:
        ValueError: if there is none, or of `read`.
    """
    if not isinstance(ground_truth, Sequence) or isinstance(ground_truth, str):
        return [read(ground_truth)]
    if not ground_truth:
        raise ValueError("ground_truth [] names no acceptable answer")
    return [read(answer) for answer in ground_truth]


def text_of(value: Any) -> str:
    """Return a reference answer as text: 1.0 as "1".

    Raises:
        ValueError: if it is neither a text that holds anything nor a finite number.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | numbers.Real | Decimal) or value != value:
        raise ValueError(f"ground_truth {value!r} is neither a text nor a number")
    text = str(value).strip()
    if not text:
        raise ValueError(f"ground_truth {value!r} names no acceptable answer")
    return text
