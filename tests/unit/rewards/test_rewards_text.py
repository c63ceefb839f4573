from typing import Any

import pytest

from mcore_rl.rewards.answer_text import answer_or_last_line, stated_answer
from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.text_match import f1, normalize


def _score(data_source, response, ground_truth) -> Any:
    return REWARDS.get(data_source)(
        data_source=data_source, solution_str=response, ground_truth=ground_truth, extra_info=None
    )


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer> Paris </answer>", "Paris"),
        ("<answer>Rome</answer> no: <ANSWER>\nParis\n</ANSWER>", "Paris"),
        (r"the answer is Rome, \boxed{Paris}", "Paris"),
        (r"\boxed{\text{a} {b}} and more", r"\text{a} {b}"),
        (r"\boxed{Rome}, or \boxed {Paris}", "Paris"),
        (r"\boxed{Rome}, or \boxed{Paris", ""),
        ("Answer: Paris.\nBecause of this.", "Paris"),
        ("The answer is: $x^2$.", "x^2"),
        ("the answer is **Paris**", "Paris"),
        ("answers are many", None),
        ("", None),
    ],
)
def test_the_stated_answer_is_the_last_of_the_first_kind(response, answer):
    assert stated_answer(response) == answer


def test_without_a_stated_answer_the_last_line_counts():
    assert answer_or_last_line("I think so.\n\n Paris. \n") == "Paris"
    assert answer_or_last_line(r"\boxed{Rome}" + "\nParis") == "Rome"
    assert answer_or_last_line("") == ""


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        ("5 + 3 = 8", "8", 1.0),
        ("#### 1,080", "1080", 1.0),
        ("The answer is 8 apples, not 9.", 8, 1.0),
        (r"\boxed{8.0} of 10", "8", 1.0),
        (r"8, so \boxed{9}", "8", 0.0),
        (r"8, so \boxed{none}", "8", 0.0),
        ("eight", "8", 0.0),
        ("", "8", 0.0),
    ],
)
def test_math_reasoning_reads_the_stated_number_or_the_last(response, reference, score):
    assert _score("math_reasoning", response, reference)["score"] == score


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Eiffel-Tower, (Paris)!", "eiffeltower paris"),
        ("An apple a day", "apple day"),
        ("\uff21\uff22 \u00e9t\u00e9", "ab \u00e9t\u00e9"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("Theatre", "theatre"),
    ],
)
def test_normalisation_is_that_of_squad(text, normalized):
    assert normalize(text) == normalized.split()


def test_f1_counts_each_common_word_as_often_as_it_stands_in_both():
    assert f1(normalize("the cat sat"), normalize("a cat")) == pytest.approx(
        2 / 3
    )  # precision 1/2, recall 1
    assert f1(normalize("cat cat cat"), normalize("cat dog")) == pytest.approx(2 / 5)  # 1/3 and 1/2
    assert f1(normalize("cat cat cat dog"), normalize("cat cat")) == pytest.approx(2 / 3)  # 2/4, 1
    assert f1(normalize("dog"), normalize("cat")) == 0.0
    assert f1(normalize("the"), normalize("an")) == 0.0
    assert f1(normalize(""), normalize("cat")) == 0.0


def test_qa_scores_the_overlap_with_the_best_reference():
    result = _score("qa", "<answer>the tall tower of Paris</answer>", ["Rome", "Tower of Paris"])
    assert result == {
        "score": pytest.approx(6 / 7),
        "pred": "tall tower of paris",
        "exact_match": 0.0,
    }
    assert _score("qa", "Answer: The Tower", {"target": ["tower"]}) == {
        "score": 1.0,
        "pred": "tower",
        "exact_match": 1.0,
    }


def test_trivia_scores_an_exact_match_with_any_alias():
    aliases = ["John F. Kennedy", "JFK"]
    assert _score("trivia", "It was...\nAnswer: J.F.K.", aliases) == {
        "score": 1.0,
        "pred": "jfk",
        "f1": 1.0,
    }
    assert _score("trivia", "Answer: John Kennedy", aliases) == {
        "score": 0.0,
        "pred": "john kennedy",
        "f1": pytest.approx(4 / 5),
    }


@pytest.mark.parametrize("data_source", ["qa", "trivia"])
@pytest.mark.parametrize("ground_truth", [None, [], {"answers": ["x"]}])
def test_a_row_without_an_acceptable_answer_is_an_error(data_source, ground_truth):
    with pytest.raises(ValueError, match="names no acceptable answer"):
        _score(data_source, "x", ground_truth)


@pytest.mark.parametrize(
    ("response", "label", "score"),
    [
        ("Answer: (B)", "b", 1.0),
        ("positive", "Positive", 1.0),
        ("It reads well.\nvery  positive.", "very positive", 1.0),
        ("positive or negative", "positive", 0.0),
        ("<answer>A</answer>", "A", 1.0),
        ("C", "C++", 0.0),
        ("", "A", 0.0),
    ],
)
def test_classification_wants_the_label_and_nothing_else(response, label, score):
    assert _score("classification", response, label)["score"] == score


def test_a_row_without_a_label_is_an_error():
    with pytest.raises(ValueError, match="is no label"):
        _score("classification", "x", "()")


@pytest.mark.parametrize("data_source", ["qa", "trivia", "classification", "math_reasoning"])
@pytest.mark.parametrize(
    "response",
    [
        "",
        "\n\n",
        "\\boxed{",
        "<answer>",
        "\x00\ud800\U0001f600",
        "answer is " * 50_000,
        "{" * 50_000,
    ],
)
def test_malformed_answers_score_zero(data_source, response):
    result = _score(data_source, response, "5")
    assert (result["score"] if isinstance(result, dict) else result) == 0.0
