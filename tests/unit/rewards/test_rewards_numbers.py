from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.rewards.exact_number import compute_score
from mcore_rl.rewards.number_text import find_numbers, parse_number


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("85", ["85"]),
        ("37+48=85.", ["37", "48", "85"]),
        ("1,234,567.50", ["1234567.50"]),
        ("1,2,3", ["1", "2", "3"]),
        ("12,34", ["12", "34"]),
        ("1,234,56", ["1234", "56"]),
        ("1{,}234 and 5,\\!678", ["1234", "5678"]),
        ("$1,234.00.", ["1234.00"]),
        ("-3", ["-3"]),
        ("= -3.5", ["-3.5"]),
        ("\u22123", ["-3"]),
        ("-$3 or $-4 or -\\$5", ["-3", "-4", "-5"]),
        ("10-3", ["10", "3"]),
        ("10 - 3", ["10", "3"]),
        ("(2)-3", ["2", "3"]),
        ("3+-5", ["3", "-5"]),
        (".5 and 0.5", [".5", "0.5"]),
        ("5km, 7%", ["5", "7"]),
        ("x2, v23 and 1e3", ["1000"]),
        ("2e-2 or 2.5E3", ["0.02", "2500"]),
        ("2 million, $1.5 billion", ["2e6", "1.5e9"]),
        ("2^10 and 2**3", ["1024", "8"]),
        ("2^{-3}, 10**-2 and 0^3", ["0.125", "0.01", "0"]),
        ("0^{-1}", [None]),
        ("2 \\times 10^{5}", ["2e5"]),
        ("1.2.3", ["1.2"]),
        ("none", []),
        ("", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text, numbers):
    assert find_numbers(text) == [number and Fraction(number) for number in numbers]


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9
    )
)
def test_every_way_to_write_a_number_reads_back(number):
    for text in (f"{number}", f"{number:,}", f"x = {number:,}.", f"({number})"):
        assert find_numbers(text) == [number]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("1,080", 1080),
        (72, 72),
        (3.0, 3),
        (" -5 ", -5),
        ("1/2", Fraction(1, 2)),
        (1e-7, Fraction(1, 10**7)),
        (Decimal("2.50"), Fraction(5, 2)),
    ],
)
def test_a_reference_answer_is_one_number(value, number):
    assert parse_number(value) == number


@pytest.mark.parametrize(
    "value", ["four", "1 or 2", "1/0", "0^-1", "5\\pi", "9" * 5_000, "1e999999999"]
)
def test_a_reference_answer_that_is_not_one_number_is_an_error(value):
    with pytest.raises(ValueError, match="is not one number"):
        parse_number(value)


@pytest.mark.parametrize(
    ("response", "ground_truth", "score"),
    [
        ("85", "85", 1.0),
        ("37+48=85", 85, 1.0),
        ("85.0", "85", 1.0),
        ("1,085", "1085", 1.0),
        ("-3", "-3", 1.0),
        ("3", "-3", 0.0),
        ("-3", "3", 0.0),
        ("85 or 86", "85", 0.0),
        ("84", "85", 0.0),
        ("850", "85", 0.0),
        ("8.5", "85", 0.0),
        ("0.1", "0.10000000000000000001", 0.0),
        ("", "85", 0.0),
        ("170/2", "85", 0.0),  # left to be done
        ("2/3", "2/3", 1.0),
        ("2/3", "2", 0.0),
        ("2/3", "3", 0.0),
        ("8.5e1", "85", 1.0),
        ("9" * 5_000, "85", 0.0),
        ("84", ["85", 84], 1.0),
        ("eighty-five", "85", 0.0),
    ],
)
def test_the_last_number_must_equal_the_reference_exactly(response, ground_truth, score):
    scored: Any = compute_score("arithmetic", response, ground_truth)
    assert scored["score"] == score
