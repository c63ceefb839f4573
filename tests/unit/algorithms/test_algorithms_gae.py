"""GAE and the critic's loss against the recursion, written out one sample at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.algorithms.advantages import ADVANTAGES, AlgorithmConfig, assign_advantages
from mcore_rl.algorithms.advantages.assign import advantage_inputs
from mcore_rl.algorithms.losses.value_clip import value_clip
from mcore_rl.metrics import to_floats
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample

PROMPT = make_prompt(uid="p:0", token_ids=[1], text="", data_source="", ground_truth=None)
NUMBERS = st.floats(-3, 3).map(lambda x: round(x, 2))


@st.composite
def samples(draw):
    """A sample with a prompt token, trained and untrained tokens, and values everywhere."""
    mask = [False, *draw(st.lists(st.booleans(), min_size=1, max_size=7))]
    values = draw(st.lists(NUMBERS, min_size=len(mask), max_size=len(mask)))
    return make_sample(
        prompt=PROMPT,
        index=0,
        token_ids=list(range(len(mask))),
        loss_mask=mask,
        rollout_logprobs=[0.0] * len(mask),
        finish_reason="stop",
        reward=draw(NUMBERS),
        values=[value if trains else 0.0 for value, trains in zip(values, mask, strict=True)],
    )


def recursion(sample, gamma, lam):
    """Return {position: raw advantage} of the trained tokens."""
    positions = [i for i, trains in enumerate(sample.loss_mask) if trains]
    values = sample.values.tolist()
    advantages, carried, next_value = {}, 0.0, 0.0
    for i in reversed(positions):
        reward = sample.reward if i == positions[-1] else 0.0
        delta = reward + gamma * next_value - values[i]
        carried = delta + gamma * lam * carried
        advantages[i], next_value = carried, values[i]
    return advantages


def computed(batch, **options):
    """Return (advantages, returns) of the tokens of each sample, in float64."""
    cfg, estimator = AlgorithmConfig.of("gae", **options), ADVANTAGES.get("gae")
    groups = [SampleGroup(prompt=PROMPT, samples=[sample]) for sample in batch]
    inputs, lengths = advantage_inputs(groups, estimator), [len(s.token_ids) for s in batch]
    returns = estimator.returns
    assert returns is not None
    of_tokens = [how(inputs, cfg.options).split(lengths) for how in (estimator.compute, returns)]
    return [[part.tolist() for part in parts] for parts in zip(*of_tokens, strict=True)]


def assigned(batch, **options):
    groups = [SampleGroup(prompt=PROMPT, samples=[sample]) for sample in batch]
    found, metrics = assign_advantages(groups, AlgorithmConfig.of("gae", **options))
    return [group.samples[0] for group in found], to_floats(metrics)


@given(
    batch=st.lists(samples(), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_returns_are_the_recursion_and_advantages_its_standard_scores(batch, gamma, lam):
    expected = [recursion(sample, gamma, lam) for sample in batch]
    found = computed(batch, gamma=gamma, lam=lam)
    raw = torch.tensor([a for by_token in expected for a in by_token.values()], dtype=torch.float64)
    spread = float(raw.max() - raw.min()) if len(raw) else 0.0
    for sample, (advantages, returns), of_sample in zip(batch, found, expected, strict=True):
        for i, trains in enumerate(sample.loss_mask):
            wanted = of_sample[i] + float(sample.values[i]) if trains else 0.0
            assert returns[i] == pytest.approx(wanted, abs=1e-12)
            if not trains:
                assert advantages[i] == 0.0
            elif spread > 1e-3:
                score = (of_sample[i] - raw.mean()) / (raw.var() + 1e-8).sqrt()
                # float64; scores divide by a deviation that may be as small as 1e-3.
                assert advantages[i] == pytest.approx(float(score), abs=1e-6)


def test_samples_get_advantages_and_returns_rounded_to_float32():
    batch = [
        make_sample(
            prompt=PROMPT,
            index=0,
            token_ids=[1, 2, 3],
            loss_mask=[False, True, True],
            rollout_logprobs=[0.0] * 3,
            finish_reason="stop",
            reward=reward,
            values=[0.0, 0.3, 0.1],
        )
        for reward in (0.1, 0.7)
    ]
    found, _ = assigned(batch, gamma=0.9, lam=0.9)
    for sample, expected in zip(found, computed(batch, gamma=0.9, lam=0.9), strict=True):
        for array, numbers in zip((sample.advantages, sample.returns), expected, strict=True):
            assert array is not None
            assert array.dtype == np.float32
            assert array.tolist() == np.array(numbers, np.float32).tolist()


@given(sample=samples().filter(lambda sample: any(sample.loss_mask)))
def test_with_gamma_and_lambda_1_every_return_is_the_reward(sample):
    ((_, of_tokens),) = computed([sample])
    returns = [r for r, trains in zip(of_tokens, sample.loss_mask, strict=True) if trains]
    assert returns == pytest.approx([sample.reward] * len(returns), abs=1e-12)


def test_the_explained_variance_is_1_for_values_that_are_the_returns():
    """Two samples of rewards 0 and 1: values that know the reward, and values that are 0.5."""
    base = make_sample(
        prompt=PROMPT,
        index=0,
        token_ids=[1, 2, 3],
        loss_mask=[False, True, True],
        rollout_logprobs=[0.0] * 3,
        finish_reason="stop",
    )
    knowing = [replace(base, reward=r, values=[0.0, r, r]) for r in (0.0, 1.0)]
    constant = [replace(base, reward=r, values=[0.0, 0.5, 0.5]) for r in (0.0, 1.0)]
    assert assigned(knowing)[1]["critic/explained_variance"] == pytest.approx(1.0)
    assert assigned(constant)[1]["critic/explained_variance"] == pytest.approx(0.0)
    assert assigned(constant)[1]["critic/values/mean"] == 0.5


def test_a_value_that_has_left_the_range_is_held_back():
    """Old value 0, range 0.5. Toward the return and beyond the range: no gradient. Away from the
    return, or within the range: that of the squared distance."""
    values = torch.tensor([0.9, -0.9, 0.3], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)
    loss, clipped = value_clip(values, torch.zeros(3, dtype=torch.float64), returns, 0.5)
    assert loss.tolist() == pytest.approx([0.5 * 1.5**2, 0.5 * 2.9**2, 0.5 * 1.7**2])
    assert clipped.tolist() == [True, False, False]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, -2.9, -1.7])
