"""Which groups teach something, and which samples train: hand-worked cases."""

import pytest

from mcore_rl.algorithms.filter_groups import FilterGroupsConfig, informative_groups
from mcore_rl.algorithms.overlong_filtering import without_truncated
from mcore_rl.errors import UserError
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample

PROMPT = make_prompt(uid="p:0", token_ids=[1], text="", data_source="", ground_truth=None)


def make_group(rewards, finish_reason="stop", **numbers):
    """Return a group with these rewards; `numbers` are lists of further numbers of the reward."""
    return SampleGroup(
        prompt=PROMPT,
        samples=[
            make_sample(
                prompt=PROMPT,
                index=i,
                token_ids=[1, 2, 3],
                loss_mask=[False, True, True],
                rollout_logprobs=[0.0, -1.0, -2.0],
                finish_reason=finish_reason,
                reward=reward,
                reward_metrics={name: values[i] for name, values in numbers.items()},
                old_logprobs=[0.0, -1.5, -2.5],
            )
            for i, reward in enumerate(rewards)
        ],
    )


def test_groups_whose_samples_are_alike_are_dropped_and_the_order_stays():
    groups = [make_group(r) for r in ([1, 0], [1, 1, 1], [0, 0], [0.5], [0, 0, 1])]
    assert informative_groups(groups, "score") == [groups[0], groups[3], groups[4]]


def test_groups_can_differ_in_a_number_that_is_not_the_reward():
    same_acc = make_group([1.0, 0.9], acc=[1, 1])
    same_score = make_group([1.0, 0.5], acc=[1, 0], score=[1.0, 1.0])
    both = [same_acc, same_score]
    assert informative_groups(both, "acc") == [same_score]
    assert informative_groups(both, "score") == [same_acc]
    assert informative_groups(both, "seq_reward") == both


def test_a_plain_reward_is_its_own_acc_and_the_penalty_counts_in_the_two_sums():
    """As verl supplies them: a penalty makes samples differ whose scores are equal."""
    penalized = make_group([1.0, 0.5], score=[1.0, 1.0])
    plain = make_group([1.0, 0.0])
    assert informative_groups([penalized, plain], "acc") == [plain]
    for metric in ("seq_reward", "seq_final_reward"):
        assert informative_groups([penalized, plain], metric) == [penalized, plain]


def test_a_number_that_the_reward_does_not_give_names_those_there_are():
    with pytest.raises(UserError) as caught:
        informative_groups([make_group([1, 0], acc=[1, 0])], "accuracy")
    assert str(caught.value) == (
        "algorithm.filter_groups.metric='accuracy' is no number of the reward of p:0. Did you mean "
        "'acc'? There are: acc, score, seq_final_reward, seq_reward."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "acc"}, "metric='acc' is not read with .*enable=false"),
        ({"max_num_gen_batches": 3}, "max_num_gen_batches=3 is not read with .*enable=false"),
        ({"enable": True, "max_num_gen_batches": -1}, "must be >= 0"),
    ],
)
def test_filter_options_that_make_no_sense_or_are_not_read_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FilterGroupsConfig(**options)


def test_no_token_of_a_truncated_sample_trains_and_the_others_stay():
    cut, ended = make_group([1, 0], finish_reason="length"), make_group([1, 0])
    untrained, same = without_truncated([cut, ended])
    assert list(same.samples) == list(ended.samples)
    for before, after in zip(cut.samples, untrained.samples, strict=True):
        assert list(after.loss_mask) == [False] * 3
        assert after.old_logprobs is not None
        assert list(after.rollout_logprobs) == list(after.old_logprobs) == [0.0] * 3
        assert after.ref_logprobs is None
        assert (after.reward, after.token_ids.tolist()) == (before.reward, [1, 2, 3])
