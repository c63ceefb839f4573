import pytest

from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.score import RewardScorer
from mcore_rl.rewards.thoughts import after_thoughts
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample


@pytest.mark.parametrize(
    ("prompt", "response", "said"),
    [
        ("2+3=", "5", "5"),
        ("2+3=", "<think>4?</think>5", "5"),
        ("2+3=", "<think>5", ""),
        ("2+3=", "<think>4?</think>5<think>6", "5"),
        ("2+3=", "5 <think>6", "5 "),
        ("Assistant: <think>\n", "5", ""),
        ("Assistant: <think>\n", "4?\n</think>\n\n5", "\n\n5"),
        ("Assistant: <think>\n\n</think>\n\n", "5", "5"),
        ("Say <think> first.\nAssistant:", "5", "5"),
    ],
)
def test_what_is_said_in_a_thought_is_not_said(prompt, response, said):
    assert after_thoughts(prompt, response) == said


def rewards(responses, prompt_text="", custom=None, **options):
    prompt = make_prompt(
        uid="t:0", token_ids=[1], text=prompt_text, data_source="gsm8k", ground_truth="5"
    )
    samples = [
        make_sample(
            prompt=prompt,
            index=index,
            token_ids=[1, 2],
            loss_mask=[False, True],
            rollout_logprobs=[0.0, -1.0],
            finish_reason="stop",
            response_text=response,
        )
        for index, response in enumerate(responses)
    ]
    scorer = RewardScorer(RewardConfig(num_workers=1, **options), custom or CustomRewardConfig())
    (group,), _ = scorer.score([SampleGroup(prompt=prompt, samples=samples)])
    scorer.close()
    return [sample.reward for sample in group.samples]


RESPONSES = ["<think>#### 5", "<think>#### 4</think>#### 5", "<think>#### 5</think>so", "#### 5"]


@pytest.mark.starts_processes
def test_registered_rewards_read_what_follows_the_thought():
    assert rewards(RESPONSES) == [0.0, 1.0, 0.0, 1.0]
    assert rewards(RESPONSES, "<think>\n") == [0.0, 1.0, 0.0, 0.0]
    assert rewards(RESPONSES, after_think=False) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.starts_processes
def test_a_custom_function_gets_the_whole_response_unless_asked_otherwise(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return len(solution_str)\n"
    )
    custom = CustomRewardConfig(path=str(file))
    assert rewards(RESPONSES[:2], custom=custom) == [13, 27]
    assert rewards(RESPONSES[:2], custom=custom, after_think=True) == [0, 6]
