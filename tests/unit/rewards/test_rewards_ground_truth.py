"""Reference answers that no response can match are found at start, by file and row."""

from typing import Any

import pytest

from mcore_rl.errors import UserError
from mcore_rl.rewards.base import REWARDS, CustomRewardConfig, RewardConfig, SandboxConfig
from mcore_rl.rewards.ground_truth import reader_of
from mcore_rl.rewards.score import RewardScorer
from tests.carriers import make_prompt

NUMBERS = ["gsm8k", "openai/gsm8k", "math_reasoning", "arithmetic", "exact_number"]
WORDS = ["qa", "trivia"]
EVERY = [*NUMBERS, *WORDS, "math", "classification"]


def check(data_source, *ground_truths, sandbox=None):
    scorer = RewardScorer(RewardConfig(sandbox=sandbox or SandboxConfig()), CustomRewardConfig())
    scorer.check_ground_truths(
        make_prompt(
            uid=f"train.parquet:{row}",
            token_ids=[1],
            text="",
            data_source=data_source,
            ground_truth=ground_truth,
        )
        for row, ground_truth in enumerate(ground_truths)
    )


@pytest.mark.parametrize(
    ("data_source", "ground_truth"),
    [
        *((name, value) for name in EVERY for value in ("", " ", [], ["5", ""], {"a": 1}, None)),
        *((name, float("nan")) for name in EVERY),
        *((name, value) for name in NUMBERS for value in ("12 or 13", "twelve", "x", "5\\pi")),
        *((name, "9" * 5_000) for name in NUMBERS),
        *((name, value) for name in WORDS for value in ("?!", ["?", "-"], {"target": "."})),
        ("classification", "()"),
        ("piecewise_continuity", {"left": 1}),
        ("piecewise_continuity", "5"),
    ],
)
def test_a_row_that_no_response_can_match_is_named_before_the_run(data_source, ground_truth):
    good = {"piecewise_continuity": []}.get(data_source, ["5"])
    row = len(good)
    with pytest.raises(UserError, match=rf"^train\.parquet:{row}: .*{data_source}.*Fix") as caught:
        check(data_source, *good, ground_truth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data_source", "ground_truth", "response", "score"),
    [
        ("gsm8k", ["5", 6], "#### 6", 1.0),
        ("gsm8k", ["5", 6], "#### 7", 0.0),
        ("arithmetic", [5.0, "6"], "5", 1.0),
        ("math_reasoning", ["5", "6"], "6", 1.0),
        ("math", ["5", r"\frac{1}{2}"], r"\boxed{1/2}", 1.0),
        ("math", ["5", "7"], r"\boxed{6}", 0.0),
        ("math", 142.0, r"\boxed{142}", 1.0),
        ("math", "12 or 13", r"\boxed{13, 12}", 1.0),
        ("classification", ["A", "B"], "Answer: b", 1.0),
        ("classification", 1.0, "<answer>1</answer>", 1.0),
        ("classification", 1.5, "<answer>1.5</answer>", 1.0),
        ("trivia", 1.0, "Answer: 1", 1.0),
        ("trivia", [3.14], "Answer: 3.14", 1.0),
        ("trivia", [3.14], "Answer: 314", 0.0),
        ("trivia", "The The", "Answer: The The", 1.0),
        ("trivia", "A", "Answer: A", 1.0),
        ("trivia", "-5", "Answer: 5", 0.0),
        ("trivia", "\u22125", "Answer: -5", 1.0),
        ("trivia", "1/2", "Answer: 12", 0.0),
        ("qa", ["?", "Paris"], "Answer: Paris", 1.0),
        ("qa", ["?", "Paris"], "Answer: ?", 0.0),
        ("qa", "C++", "Answer: C", 0.0),
    ],
)
@pytest.mark.starts_processes
def test_a_list_is_any_of_its_answers_and_a_whole_float_its_integer(
    data_source, ground_truth, response, score
):
    check(data_source, ground_truth)
    result = REWARDS.get(data_source)(
        data_source=data_source, solution_str=response, ground_truth=ground_truth, extra_info=None
    )
    assert (result["score"] if isinstance(result, dict) else result) == score


@pytest.mark.parametrize("data_source", WORDS)
@pytest.mark.parametrize("reference", ["the", "A", ["an", "?"]])
@pytest.mark.parametrize("response", ["", "...", "Answer:", "?!", "<answer></answer>", "**"])
def test_a_response_without_a_word_scores_zero_whatever_the_reference(
    data_source, reference, response
):
    result: Any = REWARDS.get(data_source)(
        data_source=data_source, solution_str=response, ground_truth=reference, extra_info=None
    )
    assert result.pop("pred") == ""
    assert set(result.values()) == {0.0}


def test_every_reward_of_text_says_what_it_reads_of_a_row():
    said = {name for name in REWARDS if reader_of(REWARDS.get(name)) is not None}
    assert {*EVERY, "piecewise_continuity"} <= said


def test_tests_of_programs_that_could_be_passed_without_work_are_named_before_the_run():
    """Nobody insists on them, or `share_assertions` does."""
    whole = {"assert_case": ["assert add(1, 2) == 3"]}
    no_split = {"assert_case": ["for n in range(3):\n    assert add(n, 1) == n + 1"]}
    with pytest.raises(UserError, match=r"^train\.parquet:1: .*share_assertions=true"):
        check("code", whole, no_split)
    check("code", whole)
    check("code", whole, no_split, sandbox=SandboxConfig(share_assertions=True))


@pytest.mark.parametrize("ground_truth", ["{}", {"inputs": ["1"], "outputs": []}, "5", {"x": 1}])
def test_a_row_without_tests_of_a_program_is_named_before_the_run(ground_truth):
    with pytest.raises(UserError, match=r"^train\.parquet:0: .*code"):
        check("code", ground_truth)
