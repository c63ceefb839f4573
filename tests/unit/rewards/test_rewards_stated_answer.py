"""One reading of the stated answer: every form, with every kind of answer, for every reward."""

import itertools

import pytest

from mcore_rl.rewards.answer_text import answer_in_words, stated_answer
from mcore_rl.rewards.base import REWARDS

FORMS = {
    "tags": "So.\n<answer>{}</answer>\nI checked.",
    "tags on lines": "<ANSWER>\n{}\n</ANSWER>",
    "tags that hold a box": r"<answer>\boxed{{{}}}</answer>",
    "box": r"Thus \boxed{{{}}}.",
    "box in display mathematics": "\\[\n\\boxed{{{}}}\n\\]",
    "box after headers": "#### 1. Compute\n3 + 4\n#### 2. Conclude\nIt is $\\boxed{{{}}}$.",
    "box after a phrase": r"The answer is 77. No: \boxed{{{}}}",
    "hashes": "We add.\n#### {}",
    "hashes without a space": "####{}",
    "bold hashes": "#### **{}**",
    "hashes after a box": "\\boxed{{77}}, or rather\n#### {}",
    "phrase": "The answer is {}.",
    "phrase with a colon": "The final answer is: {}",
    "phrase and blank line": "The final answer is:\n\n{}\n\nI hope it is correct.",
    "phrase and display mathematics": "The answer is\n\\[\n{}\n\\]\nas required.",
    "phrase and display dollars": "The answer is:\n$$\n{}\n$$\nas required.",
    "phrase and dollars": "The answer is ${}$.",
    "phrase and parentheses of LaTeX": "The answer is \\({}\\).",
    "phrase and bold": "The answer is **{}**.",
    "bold label": "**Answer:** {}",
    "bold label, colon outside": "**Answer**: {}",
    "bold whole": "**Answer: {}**",
    "label": "Answer: {}\nBecause of this.",
    "header and number below": "### Answer\n\n{}\n",
    "header of final answer": "#### Final Answer\n{}",
    "header with the answer": "#### Answer: {}",
    "bold line and number below": "**Final answer**\n\n{}",
    "phrase after headers": "#### 1. Compute\n3 + 4\n#### 2. Conclude\nThe answer is {}.",
    "header and display mathematics below": "## The final answer\n\\[ {} \\]",
    "phrase repeated": "The answer is 77.\nNo, the answer is {}.",
}

# An answer as it is stated, a reward, a reference it must equal, one it must not.
ANSWERS = [
    ("5", "gsm8k", "5", "2"),
    ("-5", "gsm8k", "-5", "5"),
    ("1,080", "gsm8k", "1080", "1"),
    ("5.50", "gsm8k", "5.5", "5"),
    ("\\$5", "gsm8k", "5", "6"),
    ("5 apples", "gsm8k", "5", "6"),
    ("5 \\text{ apples}", "gsm8k", "5", "6"),
    ("3/4", "gsm8k", "0.75", "3"),
    ("\\frac{3}{4}", "math_reasoning", "3/4", "3"),
    ("2e5", "gsm8k", "200000", "2"),
    ("2^10", "gsm8k", "1024", "2"),
    ("2 million", "math_reasoning", "2,000,000", "2"),
    ("1 1/2", "math_reasoning", "1.5", "1"),
    ("5 + 3 = 8", "math_reasoning", "8", "5"),
    ("5\\%", "gsm8k", "5", "6"),
    ("3/4", "math", r"\frac{3}{4}", "3"),
    ("10\\%", "math", "10", "100"),
    ("2 or 3", "math", "2 or 3", "2"),
    ("0", "piecewise_continuity", 0.2, None),
]
WORDS = [
    ("Paris", "qa", "paris", "Rome"),
    ("Paris", "trivia", ["Lutetia", "Paris"], "Rome"),
    ("\\text{Paris}", "trivia", "Paris", "Rome"),
    ("C++", "trivia", "C++", "C"),
    ("C#", "qa", "C#", "C"),
    ("B", "classification", "b", "A"),
    ("\\text{B}", "classification", "B", "A"),
    ("\\textbf{(B)}", "classification", "B", "A"),
    ("(B)", "classification", "B", "A"),
    ("C++", "classification", "C++", "C"),
]
PROBLEM = {"left": -2, "right": 2, "slope": 1, "offset": -5, "right_offset": 3, "left_slope": 2}


def score(data_source, response, ground_truth):
    result = REWARDS.get(data_source)(
        data_source=data_source, solution_str=response, ground_truth=ground_truth, extra_info=None
    )
    return result["score"] if isinstance(result, dict) else result


@pytest.mark.parametrize(("form", "case"), itertools.product(FORMS, [*ANSWERS, *WORDS]))
@pytest.mark.starts_processes
def test_every_form_states_every_kind_of_answer(form, case):
    answer, data_source, right, wrong = case
    response = FORMS[form].format(answer)
    if data_source == "piecewise_continuity":
        assert score(data_source, response, PROBLEM) == pytest.approx(right)
        assert score(data_source, FORMS[form].format(1), PROBLEM) == 0.0
        return
    assert score(data_source, response, right) == 1.0
    assert score(data_source, response, wrong) == 0.0


@pytest.mark.parametrize("data_source", ["gsm8k", "math_reasoning"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "hedge",
    ["5 or 6", "5, 6", "5 and 6", "5 apples or 6 apples", "5-6", "5 + 6", "5 6", "5\\pi", "5^n",
     "\\sqrt{5}", "\\frac{5}{x}", "$5$ or $6$", "5:06", "5/6/7", "5^6^7"],
)  # fmt: skip
def test_more_than_a_number_is_no_number(data_source, form, hedge):
    for part in ("5", "6"):
        assert score(data_source, FORMS[form].format(hedge), part) == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("#### 1. Compute\n#### 2. Conclude", None),
        ("#### Compute\n3 + 4 = 7", None),
        ("#### 71\n\\boxed{72}", "72"),
        ("\\boxed{71}\n#### 72", "72"),
        ("<answer>Rome</answer> <answer>Paris", "Rome"),
        ("<answer>Rome <answer>Paris</answer>", "Paris"),
        ("</answer>5<answer>", None),
        ("<answer>5</answer></answer>", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("an answer", None),
        ("the answer", ""),
        ("answers: 5", None),
        ("The answer is", ""),
        ("The answer is $5$ and $6$.", "$5$ and $6$"),
    ],
)
def test_what_is_stated_where_forms_meet_or_break_off(response, answer):
    assert stated_answer(response) == answer


def test_words_come_without_commands_of_latex():
    assert answer_in_words(r"\boxed{\textbf{\text{New\ York}}}") == "New York"
    assert answer_in_words(r"\boxed{\text{yes}}") == "yes"
    assert answer_in_words(r"\boxed{x^2}") == "x^2"
