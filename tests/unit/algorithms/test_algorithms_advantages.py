"""Advantages: hand-worked numbers, exact zeros, invariances, refused options."""

import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.algorithms.advantages import ADVANTAGES, AlgorithmConfig, assign_advantages
from mcore_rl.algorithms.advantages.assign import advantage_inputs
from mcore_rl.algorithms.advantages.gpg import ALPHAS as GPG_ALPHAS
from mcore_rl.algorithms.overlong_filtering import without_truncated
from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from mcore_rl.options import option_names
from mcore_rl.types import Sample, SampleGroup
from tests.carriers import make_prompt, make_sample

PROMPT = make_prompt(uid="p:0", token_ids=[1], text="", data_source="", ground_truth=None)
MASK = [False, True, False, True]


def algorithm(adv_estimator="grpo", **options):
    return AlgorithmConfig.of(adv_estimator, **options)


def make_groups(rewards):
    """Return one group per list of rewards, every sample with the loss mask `MASK`."""
    return [
        SampleGroup(
            prompt=PROMPT,
            samples=[
                make_sample(
                    prompt=PROMPT,
                    index=i,
                    token_ids=[1, 2, 3, 4],
                    loss_mask=MASK,
                    rollout_logprobs=[0.0] * 4,
                    finish_reason="stop",
                    reward=reward,
                    values=[0.0] * 4,
                )
                for i, reward in enumerate(group)
            ],
        )
        for group in rewards
    ]


def computed(groups, cfg):
    """Return the advantages of each sample's tokens as the estimator computes them, in float64."""
    estimator = ADVANTAGES.get(cfg.adv_estimator)
    advantages_T = estimator.compute(advantage_inputs(groups, estimator), cfg.options)
    assert advantages_T.dtype == torch.float64
    lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
    return [piece.tolist() for piece in advantages_T.split(lengths)]


def listed(sample):
    """Return the advantages of a sample as a list."""
    assert sample.advantages is not None
    return list(sample.advantages)


def advantages_of(rewards, **options):
    """Return each sample's advantage, group by group; every trained token must agree."""
    rows = iter(computed(make_groups(rewards), algorithm(**options)))
    values = []
    for group in rewards:
        of_group = [next(rows) for _ in group]
        assert all(row == [0.0, row[1], 0.0, row[1]] for row in of_group)
        values.append([row[1] for row in of_group])
    return values


@pytest.mark.parametrize("estimator", sorted({*ADVANTAGES.names()} - {"remax"}))
def test_samples_get_what_the_estimator_computes_rounded_to_float32(estimator):
    groups, cfg = (
        make_groups([[0.1, 0.7, 0.3], [0.2, 0.9]]),
        algorithm(estimator),
    )
    assigned, _ = assign_advantages(groups, cfg)
    found: list[Any] = [sample.advantages for group in assigned for sample in group.samples]
    assert {advantages.dtype for advantages in found} == {np.dtype(np.float32)}
    expected = [
        np.array(row, np.float64).astype(np.float32).tolist() for row in computed(groups, cfg)
    ]
    assert [advantages.tolist() for advantages in found] == expected
    assert any(any(row) for row in expected)


REWARDS = st.lists(
    st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=2, max_size=5),
    min_size=1,
    max_size=4,
)


@given(rewards=REWARDS)
def test_grpo_is_the_standard_score_of_the_group(rewards):
    for group, advantages in zip(rewards, advantages_of(rewards), strict=True):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        expected = [(r - mean) / (std + 1e-6) for r in group]
        if len(set(group)) == 1:
            assert advantages == [0.0] * len(group)
        else:
            # float64; a spread of 1e-3 beside rewards of 2 costs three digits.
            assert advantages == pytest.approx(expected, abs=1e-11)


@given(rewards=REWARDS)
def test_without_std_grpo_only_centers(rewards):
    centered = advantages_of(rewards, norm_adv_by_std_in_grpo=False)
    for group, advantages in zip(rewards, centered, strict=True):
        mean = statistics.fmean(group)
        assert advantages == pytest.approx([r - mean for r in group], abs=1e-14)


@pytest.mark.parametrize("options", [{}, {"norm_adv_by_std_in_grpo": False}])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -1e9])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(options, reward, size):
    # 0.1 + 0.1 + 0.1 is not 0.3: a plain mean leaves dust that the division by std amplifies.
    assert advantages_of([[reward] * size], **options) == [[0.0] * size]
    for estimator in ("gpg", "rloo", "opo", "grpo_passk"):
        assert advantages_of([[reward] * size], adv_estimator=estimator) == [[0.0] * size]


def test_a_group_of_one_has_mean_zero_and_std_one():
    assert advantages_of([[0.5]]) == [[0.5 / (1 + 1e-6)]]
    assert advantages_of([[0.5]], norm_adv_by_std_in_grpo=False) == [[0.5]]
    for estimator in ("gpg", "rloo", "opo"):
        assert advantages_of([[0.5]], adv_estimator=estimator) == [[0.5]]


@given(rewards=REWARDS, data=st.data())
def test_the_order_of_groups_and_samples_does_not_matter(rewards, data):
    estimators = [name for name in ADVANTAGES if name not in ("remax", "grpo_passk")]
    for options in ({"adv_estimator": name} for name in estimators):
        advantages = advantages_of(rewards, **options)
        order = data.draw(st.permutations(range(len(rewards))))
        within = [data.draw(st.permutations(range(len(rewards[i])))) for i in order]
        shuffled = [[rewards[i][j] for j in js] for i, js in zip(order, within, strict=True)]
        expected = [[advantages[i][j] for j in js] for i, js in zip(order, within, strict=True)]
        for actual, want in zip(advantages_of(shuffled, **options), expected, strict=True):
            # float64; the order of additions differs, and whitening divides by as little as 1e-4.
            assert actual == pytest.approx(want, abs=1e-10)


def test_gpg_scales_up_by_the_share_of_samples_that_teach():
    # B = 7, M = 3 + 2: alpha = 7 / 2.
    rewards = [[1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0]]
    assert advantages_of(rewards, adv_estimator="gpg") == [
        [3.5 * 0.5, -3.5 * 0.5],
        [0.0] * 3,
        [0.0] * 2,
    ]
    assert advantages_of(rewards, adv_estimator="gpg", gpg_f_norm=7.0)[0] == [0.25, -0.25]


def test_gpg_alpha_counts_a_lone_sample_as_one_that_teaches():
    # B = 3, M = 2: alpha = 3.
    rewards = [[1.0], [0.0, 0.0]]
    assert advantages_of(rewards, adv_estimator="gpg") == [[3.0], [0.0, 0.0]]


def test_gpg_alpha_by_nonzero_rewards_and_without_alpha():
    rewards = [[1.0, 0.0], [0.0, 0.0]]
    options = {"adv_estimator": "gpg", "gpg_alpha": "nonzero_reward"}
    assert advantages_of(rewards, **options) == [[4 * 0.5, -4 * 0.5], [0.0, 0.0]]
    options = {"adv_estimator": "gpg", "gpg_alpha": "none"}
    assert advantages_of(rewards, **options) == [[0.5, -0.5], [0.0, 0.0]]


@pytest.mark.parametrize("gpg_alpha", GPG_ALPHAS)
def test_gpg_alpha_stays_finite_when_nothing_teaches(gpg_alpha):
    options = {"adv_estimator": "gpg", "gpg_alpha": gpg_alpha}
    assert advantages_of([[0.0, 0.0], [0.0, 0.0]], **options) == [[0.0] * 2] * 2


@given(rewards=REWARDS)
def test_rloo_compares_with_the_mean_of_the_others(rewards):
    for group, advantages in zip(
        rewards, advantages_of(rewards, adv_estimator="rloo"), strict=True
    ):
        others = [statistics.fmean(group[:i] + group[i + 1 :]) for i in range(len(group))]
        expected = [r - other for r, other in zip(group, others, strict=True)]
        # float64, rewards up to 2.
        assert advantages == pytest.approx(expected, abs=1e-13)


def make_truncated_group():
    """Return rewards 1, 1, 0, 0 for responses of 4, 4, 8, 8 tokens, the last two cut off."""
    (group,) = make_groups([[1.0, 1.0, 0.0, 0.0]])
    samples = []
    for sample, length in zip(group.samples, (4, 4, 8, 8), strict=True):
        tokens, zeros = [1, *range(length)], [0.0] * (length + 1)
        samples.append(
            replace(
                sample,
                token_ids=tokens,
                loss_mask=[False] + [True] * length,
                rollout_logprobs=zeros,
                values=zeros,
                finish_reason="length" if length == 8 else "stop",
            )
        )
    return replace(group, samples=samples)


def test_opo_weighs_the_mean_by_response_tokens():
    group = make_truncated_group()
    found = computed([group], algorithm(adv_estimator="opo"))
    # The baseline is (4 + 4) / 24. float64, one division and one difference.
    expected = [2 / 3, 2 / 3, -1 / 3, -1 / 3]
    for sample, row, advantage in zip(group.samples, found, expected, strict=True):
        length = sample.num_response_tokens
        assert row == [0.0, *[pytest.approx(advantage, rel=1e-12)] * length]


@pytest.mark.parametrize("estimator", ["grpo", "gpg", "rloo", "opo"])
def test_a_truncated_sample_that_does_not_train_counts_in_its_group(estimator):
    """The others have the advantages that they have without overlong filtering."""
    cfg, group = algorithm(adv_estimator=estimator), make_truncated_group()
    (plain,), _ = assign_advantages([group], cfg)
    (filtered,), _ = assign_advantages(without_truncated([group]), cfg)
    trained = [listed(sample) for sample in plain.samples[:2]]
    assert min(trained[0][1:]) > 0
    assert [listed(sample) for sample in filtered.samples] == [*trained, *[[0.0] * 9] * 2]


def test_remax_compares_with_the_greedy_response_of_the_prompt():
    groups = [
        replace(group, baseline_reward=baseline)
        for group, baseline in zip(make_groups([[1.0, 0.5], [0.25]]), (0.5, 1.0), strict=True)
    ]
    assigned, _ = assign_advantages(groups, algorithm(adv_estimator="remax"))
    assert [[listed(s)[1] for s in g.samples] for g in assigned] == [[0.5, 0.0], [-0.75]]


def test_passk_trains_the_best_sample_by_its_lead_over_the_second():
    rewards = [[0.0, 3.0, 1.0], [2.0, 2.0, 0.0], [1.0, 1.0, 1.0]]
    options = {"adv_estimator": "grpo_passk", "norm_adv_by_std_in_grpo": False}
    assert advantages_of(rewards, **options) == [[0.0, 2.0, 0.0], [0.0] * 3, [0.0] * 3]
    lead = 2.0 / (statistics.stdev(rewards[0]) + 1e-6)
    (first, *rest) = advantages_of(rewards, adv_estimator="grpo_passk")
    assert first == pytest.approx([0.0, lead, 0.0], rel=1e-14)
    assert rest == [[0.0] * 3] * 2


def test_reinforce_plus_plus_discounts_by_the_trained_tokens_that_follow():
    groups = make_groups([[1.0], [4.0]])
    cfg = algorithm(adv_estimator="reinforce_plus_plus", gamma=0.5)
    # Returns: 0.5 and 1 of the first sample, 2 and 4 of the second; the untrained token between
    # two trained ones discounts nothing.
    returns = [0.5, 1.0, 2.0, 4.0]
    mean, std = statistics.fmean(returns), statistics.stdev(returns)
    found = computed(groups, cfg)
    assert [row[::2] for row in found] == [[0.0, 0.0]] * 2
    expected = [(x - mean) / std for x in returns]
    # The formula adds 1e-8 to the variance of 2.4.
    assert [x for row in found for x in row[1::2]] == pytest.approx(expected, rel=1e-8)


@given(rewards=REWARDS)
def test_whitened_advantages_have_mean_zero_and_variance_one(rewards):
    for estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        values = [x for group in advantages_of(rewards, adv_estimator=estimator) for x in group]
        values *= 2  # two trained tokens per sample
        if any(values):
            assert statistics.fmean(values) == pytest.approx(0, abs=1e-9)
            # 1e-8 beside a variance that can be as small as 1e-8: below 1, never above.
            assert statistics.variance(values) <= 1 + 1e-9


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_a_batch_of_equal_rewards_whitens_to_exactly_zero(estimator):
    rewards = [[0.1] * 3, [0.1] * 3]
    assert advantages_of(rewards, adv_estimator=estimator) == [[0.0] * 3] * 2


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_a_batch_in_which_nothing_trains_has_no_advantages(estimator):
    groups = [
        replace(
            group,
            samples=[replace(s, loss_mask=[False] * 4) for s in group.samples],
            baseline_reward=0.5,
        )
        for group in make_groups([[1.0, 0.0], [0.0, 2.0]])
    ]
    assigned, _ = assign_advantages(groups, algorithm(adv_estimator=estimator))
    assert all(listed(s) == [0.0] * 4 for g in assigned for s in g.samples)


def test_a_first_token_never_gets_an_advantage():
    (group,) = make_groups([[1.0, 0.0]])
    samples = [
        Sample(**{**{f: getattr(s, f) for f in s.__slots__}, "loss_mask": [True] * 4})
        for s in group.samples
    ]
    (assigned,), _ = assign_advantages(
        [SampleGroup(prompt=PROMPT, samples=samples)],
        algorithm(norm_adv_by_std_in_grpo=False),
    )
    assert [listed(s) for s in assigned.samples] == [
        [0.0, 0.5, 0.5, 0.5],
        [0.0, -0.5, -0.5, -0.5],
    ]


def test_metrics_are_over_trained_tokens_and_groups():
    _, metrics = assign_advantages(
        make_groups([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [3.0]]),
        algorithm(norm_adv_by_std_in_grpo=False),
    )
    assert to_floats(metrics) == pytest.approx(
        {
            "advantage/mean": 3.0 / 9,
            "advantage/abs_mean": (0.75 + 3 * 0.25 + 3.0) / 9,
            "advantage/max": 3.0,
            "reward/zero_std_group_frac": 1 / 3,
        },
        rel=1e-6,  # metrics are float32
    )


def test_no_groups_give_no_advantages():
    assigned, metrics = assign_advantages([], algorithm())
    assert assigned == []
    assert to_floats(metrics) == {}


DISCOUNTS = [("gae", "gamma"), ("gae", "lam"), ("reinforce_plus_plus", "gamma")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpg_alpha": "none"}, r"algorithm\.gpg_alpha='none' is not read with .*=grpo"),
        ({"gpg_f_norm": 2.0}, r"algorithm\.gpg_f_norm=2\.0 is not read with .*=grpo"),
        ({"gamma": 0.9}, r"algorithm\.gamma=0\.9 is not read"),
        ({"lam": 0.9}, r"algorithm\.lam=0\.9 is not read"),
        (
            {"adv_estimator": "gpg", "norm_adv_by_std_in_grpo": False},
            r"algorithm\.norm_adv_by_std_in_grpo=False is not read with .*=gpg",
        ),
        ({"adv_estimator": "gpg", "gpg_alpha": "valid"}, "Did you mean 'valid_groups'"),
        ({"adv_estimator": "gpg", "gpg_f_norm": 0.0}, r"gpg_f_norm=0\.0 must be > 0"),
        (
            {"adv_estimator": "rloo", "gamma": 0.9},
            r"algorithm\.gamma=0\.9 is not read with .*=rloo",
        ),
        *(
            (
                {"adv_estimator": estimator, name: value},
                rf"algorithm\.{name}={value} must be in \[0, 1\]",
            )
            for estimator, name in DISCOUNTS
            for value in (-0.5, 1.5)
        ),
        ({"kl_penalty": "k3+"}, r"algorithm\.kl_penalty='k3\+' is not one of"),
        ({"adv_estimator": "grp"}, "Did you mean 'grpo'"),
    ],
)
def test_options_that_are_wrong_or_unread_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        algorithm(**options)


@pytest.mark.parametrize(("estimator", "name"), DISCOUNTS)
def test_a_discount_of_zero_is_taken(estimator, name):
    assert getattr(algorithm(estimator, **{name: 0.0}).options, name) == 0.0


def test_options_at_their_default_are_never_refused():
    defaults = {
        "norm_adv_by_std_in_grpo": True,
        "gpg_alpha": "valid_groups",
        "gpg_f_norm": 1.0,
        "gamma": 1.0,
        "lam": 1.0,
    }
    assert sorted(defaults) == option_names(ADVANTAGES)
    for estimator in ADVANTAGES:
        assert algorithm(estimator, **defaults).options == ADVANTAGES.get(estimator).config()
