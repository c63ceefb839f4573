"""Numbers as people write them: "1,234", "-3", "$18.50", "3.0".

Numbers are exact decimals, so 3.0 equals 3 and no rounding happens. A minus is a sign only where
nothing precedes it that could be subtracted from ("10-3" holds 10 and 3). Digits glued to a letter
before them ("x2", "1e3") are no number of their own. Fractions and exponents are not read.
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}.]) [-\u2212] )?     # ASCII hyphen or Unicode minus
    (?: \\?\$ )?                              # dollar sign, in LaTeX escaped
    (?<![A-Za-z_0-9.])                        # not inside a word or a version number
    (?P<digits>
        (?: [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]+ )?
        | \.[0-9]+
    )
    """,
    re.VERBOSE,
)
_LATEX_COMMA = re.compile(r"\{,\}|,\\!")


def find_numbers(text: str) -> list[Decimal]:
    """Return every number in `text`, in order."""
    matches = _NUMBER.finditer(_LATEX_COMMA.sub(",", text))
    return [
        Decimal(("-" if match["sign"] else "") + match["digits"].replace(",", ""))
        for match in matches
    ]


def parse_number(value: object) -> Decimal:
    """Return the one number that a reference answer ("1,080", 72, 3.0) consists of.

    Raises:
        ValueError: if it holds no number or several.
    """
    found = find_numbers(str(value))
    if len(found) != 1:
        raise ValueError(f"ground_truth {value!r} is not one number")
    return found[0]
