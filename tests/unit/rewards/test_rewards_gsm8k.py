from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.rewards.gsm8k import compute_score, final_answer

FORMS = [
    "It costs 5 + 3 dollars.\n#### {n}",
    "####{n}",
    "#### ${n}.00",
    "#### {n} apples for 3 friends",
    "Thus \\boxed{{{n}}}.",
    "$\\boxed{{\\${n} \\text{{ dollars}}}}$",
    "The answer is ${n}.00.",
    "The final answer is: **{n}**",
    "Answer: {n}",
    "The answer is\n\n{n}",
    "#### 7\nNo, wait.\n#### {n}",
    "\\boxed{{7}} no, \\boxed{{{n}}}",
    "The answer is 7. So I write\n#### {n}\nThe answer is checked.",
    "The answer is $\\boxed{{{n}}}$. I hope it is correct.",
]


def _scored(response, reference) -> Any:
    return compute_score("gsm8k", response, reference)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)
@given(number=st.integers(-(10**7), 10**7))
def test_a_stated_answer_scores_one_and_its_neighbours_zero(form, number):
    for text in (f"{number}", f"{number:,}"):
        response = form.format(n=text)
        assert _scored(response, str(number))["score"] == 1.0
        assert _scored(response, str(number - 1))["score"] == 0.0
        assert _scored(response, str(number + 1))["score"] == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "72",
        "So it is 72.",
        "#### seventy-two",
        "####",
        "#### 1 2 3 72",
        "#### 7\n72",
        "\\boxed{71, 72}",
        "\\boxed{72",
        "The answer is \\boxed{}. 72",
        "#### 72\n\\boxed{71}",
        "#### 0.72",
        "#### 7 2",
    ],
)
def test_an_unstated_hedged_or_broken_answer_scores_zero(response):
    assert _scored(response, "72")["score"] == 0.0


def test_no_final_answer_is_none_rather_than_a_number():
    assert final_answer("I cannot say.") is None


def test_a_reference_with_thousands_separators_is_understood():
    assert _scored("#### 1080", "1,080")["score"] == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 1,080", "1080"),
        ("#### $1080.00", "1080"),
        ("The answer is 2/4.", "1/2"),
        ("#### 9" + "0" * 500, None),
        ("I cannot say.", None),
    ],
)
def test_ways_to_write_a_number_are_one_answer(response, answer):
    assert _scored(response, "1")["pred"] == answer
