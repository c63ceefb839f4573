"""The soft overlong penalty: nothing, then a line, then the whole factor."""

import pytest

from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from mcore_rl.rewards.base import OverlongBufferConfig
from mcore_rl.rewards.overlong import penalize_overlong
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample

PROMPT = make_prompt(uid="p:0", token_ids=[1, 2], text="", data_source="", ground_truth=None)


def test_the_penalty_grows_over_the_buffer_and_the_score_is_kept():
    lengths = [1, 6, 7, 8, 10]  # of at most 10, the last 4 of them in the buffer
    samples = [
        make_sample(
            prompt=PROMPT,
            index=i,
            token_ids=[1, 2, *[3] * length],
            loss_mask=[False] * 2 + [True] * length,
            rollout_logprobs=[0.0] * (2 + length),
            finish_reason="stop",
            reward=1.0,
            reward_metrics={"acc": 1.0},
        )
        for i, length in enumerate(lengths)
    ]
    (group,), metrics = penalize_overlong(
        [SampleGroup(prompt=PROMPT, samples=samples)],
        OverlongBufferConfig(enable=True, len=4, penalty_factor=2.0),
        max_response_length=10,
    )
    assert [s.reward for s in group.samples] == [1.0, 1.0, 0.5, 0.0, -1.0]
    assert all(s.reward_metrics == {"acc": 1.0, "score": 1.0} for s in group.samples)
    assert to_floats(metrics) == {
        "reward/overlong_penalty": pytest.approx(-3.5 / 5),
        "reward/overlong_frac": pytest.approx(3 / 5),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"len": 4}, r"reward\.overlong_buffer\.len=4 is not read"),
        ({"penalty_factor": 2.0}, r"overlong_buffer\.penalty_factor=2\.0 is not read"),
        ({"enable": True}, r"reward\.overlong_buffer\.len=0 must be > 0"),
        ({"enable": True, "len": 4, "penalty_factor": 0.0}, "must be > 0"),
    ],
)
def test_buffer_options_that_make_no_sense_or_are_not_read_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        OverlongBufferConfig(**options)
