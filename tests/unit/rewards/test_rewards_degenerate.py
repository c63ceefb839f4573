"""Any text of any length has a score within [0, 1], and no text is read over and over.

What the time grows with is measured by `benchmarks/rewards.py`; here a quadratic reading would take
minutes to hours, and the bound on CPU time tells it from a linear one that takes some seconds.
"""

import time
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.piecewise_continuity import EXAMPLE
from tests.degenerate_texts import AFFIXES, UNITS

REFERENCES = {
    "gsm8k": "5",
    "math_reasoning": "5",
    "arithmetic": "5",
    "math": "5",
    "classification": "5",
    "qa": ["a", "five"],
    "trivia": ["a", "five"],
    "piecewise_continuity": asdict(EXAMPLE),
}


def score(data_source, response) -> Any:
    result = REWARDS.get(data_source)(
        data_source=data_source,
        solution_str=response,
        ground_truth=REFERENCES[data_source],
        extra_info=None,
    )
    return result["score"] if isinstance(result, dict) else result


WITHOUT_PARSER = [name for name in REFERENCES if name != "math"]


@pytest.mark.parametrize("data_source", WITHOUT_PARSER)
@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(
        st.one_of(
            st.text(st.characters(), max_size=20),  # surrogates, too
            st.tuples(st.sampled_from(UNITS), st.integers(1, 300)).map(lambda x: x[0] * x[1]),
        ),
        max_size=8,
    ),
    affixes=st.sampled_from(AFFIXES),
)
def test_any_text_has_a_score(data_source, parts, affixes):
    assert 0.0 <= score(data_source, affixes[0] + "".join(parts) + affixes[1]) <= 1.0


@pytest.mark.parametrize("data_source", REFERENCES)
@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 125_000,
        "<answer>" + "\u0301" * 1_000_000 + "</answer>",
        "a = " + "9" * 1_000_000 + " = a",
        "The answer is " + "1" * 1_000_000,
        "\\boxed{" * 140_000,
        "#### b" * 160_000,
        "x = (9)" + "(9)" * 330_000 + " = a",
    ],
    ids=["tags", "marks", "digits", "stated digits", "boxes", "hashes", "product"],
)
@pytest.mark.starts_processes
def test_a_megabyte_is_read_in_seconds_of_cpu_time(data_source, text):
    start = time.process_time()
    assert score(data_source, text) == 0.0
    # Under 1 s each where nothing is read twice; the first three took minutes or an exception.
    assert time.process_time() - start < 20
