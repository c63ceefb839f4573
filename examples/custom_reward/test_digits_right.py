"""What a test of one's own reward can look like: python -m pytest examples/custom_reward"""

import digits_right
import pytest

from mcore_rl.rewards.base import find_reward


@pytest.mark.parametrize(
    ("said", "number", "score"),
    [
        ("85", "85", 1.0),
        ("75", "85", 0.5),
        ("5", "85", 0.5),
        ("185", "85", 2 / 3),
        ("", "85", 0.0),
        ("85", ["12", "85"], 1.0),
    ],
)
def test_the_score_is_the_share_of_digits_in_their_places(said, number, score):
    reward = find_reward("digits_right")
    found = reward(data_source="digits_right", solution_str=said, ground_truth=number)
    assert found == {"score": score, "is_number": float(said != ""), "pred": said}


@pytest.mark.parametrize("ground_truth", ["", "8.5", None, []])
def test_a_reference_that_is_no_number_is_refused(ground_truth):
    with pytest.raises(ValueError, match="ground_truth"):
        digits_right.read_numbers(ground_truth)
