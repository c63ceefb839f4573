"""What comes from elsewhere, as text and as JSON: it commands no terminal and ends no program."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.errors import RunError, UserError
from mcore_rl.foreign_json import MOST_LEVELS, parse_json
from mcore_rl.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x08c\x00\x7f", r"a\rb\x08c\x00\x7f"),
        ("\x9b31m", r"\x9b31m"),  # the escape sequence in one character
        ("right \u202eto left", r"right \u202eto left"),
        ("half \ud83d of a pair", r"half \ud83d of a pair"),
        ("lines\n\tand tabs", "lines\n\tand tabs"),
        ("naïve 漢字\u3000😀 é", "naïve 漢字\u3000😀 é"),
    ],
)
def test_what_commands_a_terminal_is_written_out(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_text_can_be_written_and_holds_no_control_characters(text):
    shown = printable(text)
    shown.encode()
    assert not [c for c in shown if (c < " " or "\x7f" <= c <= "\x9f") and c not in "\n\t"]


def test_errors_show_a_stranger_s_name_without_its_commands():
    assert str(UserError("data_source \x1b[31mred")) == r"data_source \x1b[31mred"
    assert str(RunError("red \x1b[31m", role="reward")) == r"[role reward] red \x1b[31m"


def nested(num_levels, kind):
    opening, closing = {"lists": ("[", "]"), "objects": ('{"a":', "}")}[kind]
    return opening * num_levels + "1" + closing * num_levels


@pytest.mark.parametrize("kind", ["lists", "objects"])
def test_json_is_read_to_the_deepest_level_allowed_and_no_further(kind):
    assert parse_json(nested(MOST_LEVELS, kind)) == json.loads(nested(MOST_LEVELS, kind))
    for num_levels in (MOST_LEVELS + 1, sys.getrecursionlimit(), 10**6):
        with pytest.raises(ValueError, match="more than 100 levels deep"):
            parse_json(nested(num_levels, kind).encode())


def test_many_brackets_side_by_side_are_no_depth():
    rows = [[{"a": []}]] * 1000
    assert parse_json(json.dumps(rows)) == rows


def test_wrong_json_is_a_value_error():
    for text in (b"\xff", "{", "", "9" * 5000):
        with pytest.raises(ValueError, match=r"decode|Expecting|digits"):
            parse_json(text)
