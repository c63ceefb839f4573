"""Safe display of foreign texts: text of a model, a data file or a reward cannot control a
terminal."""

from __future__ import annotations

import re

_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for tabs and ends of lines
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of the text
    "\u2028\u2029"  # ends of lines that few programs know
    "\ud800-\udfff]"  # halves of a pair, which no encoding has
)


def printable(text: str) -> str:
    r"""Return the text with `\x1b` in place of the escape character, and so on.

    It can be written in UTF-8, and a terminal takes no command from it.
    """
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
