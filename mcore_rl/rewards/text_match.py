"""How close a short text is to reference texts: SQuAD's normalisation, exact match and F1.

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

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Return `text` in lower case, without ASCII punctuation and the articles a, an, the, its
    words one space apart; composed (NFKC), so that an accent is one way only."""
    text = unicodedata.normalize("NFKC", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1.0 if both are equal after normalisation, otherwise 0.0."""
    return float(normalize(answer) == normalize(reference))


def f1(answer: str, reference: str) -> float:
    """Return 2 p r / (p + r): p of the answer's words are in the reference, r the other way
    round, each word as often as it stands in both. Two empty texts are equal."""
    words, expected = normalize(answer).split(), normalize(reference).split()
    if not words or not expected:
        return float(words == expected)
    num_common = (collections.Counter(words) & collections.Counter(expected)).total()
    return 2 * num_common / (len(words) + len(expected))


def best(measure: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """Return the measure for the reference that `answer` fits best."""
    return max(measure(answer, reference) for reference in references)


def read_references(ground_truth: Any) -> list[str]:
    """Return the acceptable answers of a row: a text, a list of texts, or a mapping that holds
    either under "target".

    Raises:
        ValueError: if there is none.
    """
    if isinstance(ground_truth, Mapping):
        ground_truth = ground_truth.get("target")
    if isinstance(ground_truth, str | int | float):
        ground_truth = [ground_truth]
    if not isinstance(ground_truth, Sequence) or not ground_truth:
        raise ValueError(f"ground_truth {ground_truth!r} names no acceptable answer")
    return [str(reference) for reference in ground_truth]
