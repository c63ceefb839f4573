"""KL in the reward: the penalty by hand, and the controllers' closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.algorithms.kl_in_reward import KlController, KlCtrlConfig, penalize_rewards
from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample

PROMPT = make_prompt(uid="p:0", token_ids=[1], text="", data_source="", ground_truth=None)


def sample(index, reward, old, ref, mask):
    return make_sample(
        prompt=PROMPT,
        index=index,
        token_ids=list(range(len(mask))),
        loss_mask=mask,
        rollout_logprobs=old,
        finish_reason="stop",
        reward=reward,
        old_logprobs=old,
        ref_logprobs=ref,
    )


GROUPS = [
    SampleGroup(
        prompt=PROMPT,
        samples=[
            sample(0, 1.0, [0.0, -1.0, -2.0], [0.0, -1.5, -2.25], [False, True, True]),
            sample(1, 0.0, [0.0, -1.0, -9.0], [0.0, -0.5, 0.0], [False, True, False]),
        ],
    ),
    SampleGroup(prompt=PROMPT, samples=[sample(0, 2.0, [0.0, 0.0], [0.0, 0.0], [False, False])]),
]
# KL sums 0.75, -0.5 and nothing; means per token 0.375, -0.5.


def rewards(groups):
    return [s.reward for group in groups for s in group.samples]


def test_rewards_lose_the_summed_kl_of_their_trained_tokens():
    penalized, kl = penalize_rewards(GROUPS, 0.5, "kl")
    assert rewards(penalized) == [1.0 - 0.5 * 0.75, 0.0 + 0.5 * 0.5, 2.0]
    assert kl == (0.375 - 0.5) / 2
    assert rewards(GROUPS) == [1.0, 0.0, 2.0]


def test_a_lone_sample_has_the_kl_of_its_own_tokens():
    lone = [SampleGroup(prompt=PROMPT, samples=GROUPS[0].samples[:1])]
    assert penalize_rewards(lone, 0.5, "kl")[1] == 0.375


def test_without_any_trained_token_the_kl_is_zero():
    penalized, kl = penalize_rewards(GROUPS[1:], 0.5, "k3")
    assert (rewards(penalized), kl) == ([2.0], 0.0)


def test_a_fixed_controller_keeps_its_coefficient():
    controller = KlController(KlCtrlConfig(kl_coef=0.5), "kl")
    for _ in range(2):
        groups, metrics = controller.penalize(GROUPS)
        assert rewards(groups) == [0.625, 0.25, 2.0]
        assert to_floats(metrics) == {"reward/kl": -0.0625, "reward/kl_coef": 0.5}


@given(kl=st.floats(0, 1), num_samples=st.integers(1, 10_000))
def test_an_adaptive_controller_follows_its_closed_form(kl, num_samples):
    cfg = KlCtrlConfig(type="adaptive", kl_coef=0.1, target_kl=0.25, horizon=5000)
    controller = KlController(cfg, "kl")
    controller.update(kl, num_samples)
    error = sorted((-0.2, kl / 0.25 - 1, 0.2))[1]
    assert controller.kl_coef == pytest.approx(0.1 * (1 + error * num_samples / 5000), rel=1e-15)


def test_an_adaptive_controller_penalizes_first_and_moves_after():
    cfg = KlCtrlConfig(type="adaptive", kl_coef=0.5, horizon=10)
    controller = KlController(cfg, "kl")
    groups, metrics = controller.penalize(GROUPS)
    assert rewards(groups) == [0.625, 0.25, 2.0]
    assert to_floats(metrics)["reward/kl_coef"] == 0.5
    # KL below the target: the error is cut to -0.2; 3 samples of a horizon of 10.
    assert controller.kl_coef == pytest.approx(0.5 * (1 - 0.2 * 3 / 10), rel=1e-15)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_an_adaptive_controller_learns_nothing_from_a_kl_that_is_not_finite(kl):
    """One such step must not spoil the rewards of all later ones."""
    controller = KlController(KlCtrlConfig(type="adaptive", kl_coef=0.5, horizon=10), "kl")
    controller.update(kl, 8)
    assert controller.kl_coef == 0.5


def test_a_controller_resumes_where_it_was():
    cfg = KlCtrlConfig(type="adaptive", kl_coef=0.5)
    first, second = KlController(cfg, "kl"), KlController(cfg, "kl")
    first.update(1.0, 100)
    second.load_state_dict(first.state_dict())
    assert second.kl_coef == first.kl_coef != 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "adaptiv"}, "Did you mean 'adaptive'"),
        ({"kl_coef": -0.1}, r"algorithm\.kl_ctrl\.kl_coef=-0\.1 must be >= 0"),
        ({"type": "adaptive", "horizon": 0}, r"algorithm\.kl_ctrl\.horizon=0 must be > 0"),
        ({"type": "adaptive", "target_kl": 0.0}, r"target_kl=0\.0 must be > 0"),
        ({"horizon": 5}, r"algorithm\.kl_ctrl\.horizon=5 is not read with .*type=fixed"),
        ({"target_kl": 0.2}, r"algorithm\.kl_ctrl\.target_kl=0\.2 is not read"),
    ],
)
def test_controller_options_that_are_wrong_or_unread_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        KlCtrlConfig(**options)
