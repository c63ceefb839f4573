"""Values cross processes as plain data of exactly their type, whoever writes them."""

import json
import math
from collections import Counter, OrderedDict, deque, namedtuple
from enum import Enum, IntEnum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.jail.plain_data import decode, encode, is_same

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.sets(SCALARS)
        | st.frozensets(SCALARS)
        | st.dictionaries(SCALARS, inner)
    ),
    max_leaves=20,
)


def _crossed(value):
    return decode(json.loads(json.dumps(encode(value))))


@given(VALUES)
def test_what_crosses_has_its_type_and_its_value(value):
    crossed = _crossed(value)
    assert type(crossed) is type(value)
    assert repr(crossed) == repr(value) or crossed == value
    assert is_same(crossed, value)


Point = namedtuple("Point", "x y")


class Number(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__

    def __repr__(self):
        return "3"


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Number(7), 7),
        (Level.LOW, 1),
        (Point(1, 2), (1, 2)),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (bytearray(b"a"), b"a"),
        (float("inf"), float("inf")),
        (range(1, 9, 2), range(1, 9, 2)),
        ({(1, 2): {3}}, {(1, 2): {3}}),
    ],
)
def test_subclasses_cross_as_what_they_are_a_kind_of(value, plain):
    crossed = _crossed(value)
    assert type(crossed) is type(plain)
    assert crossed == plain


def test_a_number_crosses_that_is_too_long_to_be_read_in_decimal():
    for number in (10**5000, -(10**5000)):
        assert _crossed(number) == number
        assert _crossed([number]) == [number]


def test_what_a_generator_gives_crosses_as_an_iterator():
    for made in ((x for x in "ab"), map(str, "ab"), dict.fromkeys("ab").keys()):
        crossed = _crossed(made)
        assert crossed != ["a", "b"]
        assert list(crossed) == ["a", "b"]


@pytest.mark.parametrize(
    "value", [object(), int, print, Enum("Colour", "RED").RED, [object()], {1: lambda: 1}]
)
def test_what_is_no_plain_data_does_not_cross(value):
    with pytest.raises(TypeError, match="is no plain data"):
        encode(value)


@pytest.mark.parametrize(
    "content", [["object", []], ["list"], ["set", [["list", []]]], ["int", 3], [], ["Decimal", "x"]]
)
def test_what_nobody_wrote_is_not_read(content):
    with pytest.raises((ValueError, TypeError, KeyError, ArithmeticError)):
        decode(content)


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        (0, False, False),
        ([True], [1], False),
        ({"a": (1, True)}, {"a": (1, 1)}, False),
        ({"a": (1, True)}, {"a": (1, True)}, True),
        ((1, 2), [1, 2], False),
        ([1, 2], [1, 2, 3], False),
        ({1, 2}, {2, 1}, True),
        ({1: 2}, {1: 2, 3: 4}, False),
        ("1", 1, False),
        (None, False, False),
        (float("nan"), float("nan"), False),
        (np.bool_(True), True, True),
    ],
)
def test_values_are_the_same_by_type_and_value(value, expected, same):
    assert is_same(value, expected) is same


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (0.3, 0.1 + 0.2, True),
        (1e12, 1e12 + 1, True),  # relative
        (1e-9, 0.0, True),  # absolute
        (0.3001, 0.3, False),
        (1, 1.0000001, True),
        (1.0000001, 1, False),  # an integer is exact
        (10**400, 1.5, False),
        (True, 1.0, False),
        ([[0.3]], [[0.1 + 0.2]], True),
        (math.inf, 1e308, False),
    ],
)
def test_floats_may_differ_by_the_tolerance_where_a_float_is_expected(value, expected, same):
    assert is_same(value, expected, 1e-6) is same
