"""How close a short text is to reference texts: SQuAD's normalisation, exact match and F1.

Two exceptions to that normalisation, where it would change the answer: signs that belong to a word
or number stay (C++, C#, -5, 3.14, 1/2), and a text of only articles keeps them. A text of which
nothing is left matches nothing.

Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1; TriviaQA (arXiv:1705.03551) scores the
same way, with several references.
"""

from __future__ import annotations

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mcore_rl.rewards.ground_truth import any_of, text_of

_ARTICLES = frozenset(("a", "an", "the"))
_OF_A_WORD = re.compile(
    r"""
      (?<=\w) (?: \+{1,2} | \# ) (?!\w)      # C++, C#, A+
    | (?<![\w.)]) - (?= \.?[0-9] )           # -5
    | (?<=[0-9]) [./] (?=[0-9])              # 3.14, 1/2
    """,
    re.VERBOSE,
)
_KEPT = {ord(sign): 0xE000 + n for n, sign in enumerate("+#-./")}
"""Signs to code points for private use, while punctuation is dropped."""
_DROPPED = {**dict.fromkeys(map(ord, string.punctuation)), **{n: chr(s) for s, n in _KEPT.items()}}
_MOST_OF_A_WORD = 200
"""Most characters of a word that is composed. Unicode's composition takes quadratic time in the
number of marks on one letter; no word of a reference has as many characters as this."""

Words = Sequence[str]


def normalize(text: str) -> Words:
    """Return the words of `text`: in lower case, without ASCII punctuation and the articles a, an,
    the, composed (NFKC), so that an accent has one form only."""
    if not text.isascii():
        text = " ".join(_composed(word) for word in text.replace("\u2212", "-").split())
    text = _OF_A_WORD.sub(lambda sign: sign[0].translate(_KEPT), text.lower())
    words = text.translate(_DROPPED).split()
    return [word for word in words if word not in _ARTICLES] or words


def exact_match(answer: Words, reference: Words) -> float:
    """Return 1.0 if both are the same words and there are any, otherwise 0.0."""
    return float(bool(answer) and answer == reference)


def f1(answer: Words, reference: Words) -> float:
    """Return 2 p r / (p + r): p is the share of the answer's words that are in the reference, r the
    reverse; each word counts as often as it is in both."""
    if not answer or not reference:
        return 0.0
    num_common = (collections.Counter(answer) & collections.Counter(reference)).total()
    return 2 * num_common / (len(answer) + len(reference))


def best(
    measure: Callable[[Words, Words], float], answer: Words, references: Sequence[Words]
) -> float:
    """Return the measure for the reference that `answer` fits best."""
    return max(measure(answer, reference) for reference in references)


def read_references(ground_truth: Any) -> list[Words]:
    """Return the words of the acceptable answers of a row: of a text, a list of texts, or a mapping
    that holds either under "target". Those that hold nothing but punctuation are left out.

    Raises:
        ValueError: if no answer is left.
    """
    target = ground_truth.get("target") if isinstance(ground_truth, Mapping) else ground_truth
    if target is None:
        raise ValueError(f"ground_truth {ground_truth!r} names no acceptable answer")
    references = [words for words in map(normalize, any_of(target, text_of)) if words]
    if not references:
        raise ValueError(f"ground_truth {ground_truth!r} names no acceptable answer")
    return references


def _composed(word: str) -> str:
    return unicodedata.normalize("NFKC", word) if len(word) <= _MOST_OF_A_WORD else word
