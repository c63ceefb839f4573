"""Values and gradients against numbers of an independent float64 implementation.

`tests/data/reference_vectors.safetensors` holds 12 sequences of 2 to 17 tokens, all trained, laid
end to end, and expected results for advantages, losses (every aggregation, several clips), KL and
aggregation. It proves the formulas; what happens to masks, micro-batches and empty input is in
the other files of this folder.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mcore_rl.algorithms.advantages import ADVANTAGES, AdvantageInputs, AlgorithmConfig
from mcore_rl.algorithms.aggregate import AGG_MODES, token_weights
from mcore_rl.algorithms.kl import kl_penalty
from mcore_rl.algorithms.losses import POLICY_LOSSES, ClipConfig, PolicyLossInputs
from mcore_rl.algorithms.objective import ActorObjective, actor_objective
from mcore_rl.metrics import to_floats
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators

VECTORS = load_file(Path(__file__).parents[2] / "data" / "reference_vectors.safetensors")
PADDED_WIDTH = 17.0
"""What the reference divides by in seq-mean-token-sum-norm."""

# float64; the reference adds 1e-8 to some of its denominators.
TOLERANCE = 1e-9
METRIC_TOLERANCE = 1e-6  # metrics are float32


def names(section):
    return sorted(
        {key.split("/", 1)[1].rsplit("/", 1)[0] for key in VECTORS if key.startswith(section)}
    )


def reference_segments():
    num_tokens_S = VECTORS["inputs/num_tokens"]
    return Segments(
        sequence_T=torch.arange(12).repeat_interleave(num_tokens_S),
        mask_T=torch.ones(int(num_tokens_S.sum()), dtype=torch.bool),
        num_tokens_S=num_tokens_S.double(),
    )


DENOMINATORS = Denominators(num_tokens=116, num_sequences=12)


ESTIMATORS = {
    "grpo": {"name": "grpo"},
    "grpo_nostd": {"name": "grpo", "norm_adv_by_std_in_grpo": False},
    "gpg": {"name": "gpg", "gpg_alpha": "nonzero_reward"},
    "rloo": {"name": "rloo"},
    "opo": {"name": "opo"},
    "reinforce_plus_plus/gamma=1.0": {"name": "reinforce_plus_plus"},
    "reinforce_plus_plus/gamma=0.99": {"name": "reinforce_plus_plus", "gamma": 0.99},
    "reinforce_plus_plus_baseline": {"name": "reinforce_plus_plus_baseline"},
}


@pytest.mark.parametrize("rewards", ["binary", "real"])
@pytest.mark.parametrize(("estimator", "options"), ESTIMATORS.items())
def test_advantages_equal_the_reference(rewards, estimator, options):
    cfg = AlgorithmConfig.of(**options)
    inputs = AdvantageInputs(
        rewards_N=VECTORS[f"inputs/rewards/{rewards}"],
        group_N=VECTORS["inputs/group"],
        segments=reference_segments(),
        num_response_tokens_N=VECTORS["inputs/num_tokens"].double(),
    )
    advantages_T = ADVANTAGES.get(cfg.choice).compute(inputs, cfg.options)
    expected_T = VECTORS[f"adv/{rewards}/{estimator}"]
    assert torch.allclose(advantages_T, expected_T, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", names("loss/"))
def test_loss_and_gradient_equal_the_reference(name):
    loss_mode, agg_mode, low, high = name.split("/")
    loss = POLICY_LOSSES.get(loss_mode)
    if loss_mode == "geo_mean":
        assert loss.agg_mode is not None
        agg_mode = loss.agg_mode
    bounds = {"clip_ratio_low": float(low), "clip_ratio_high": float(high)}
    spec = ActorObjective(
        policy_loss=loss,
        options=loss.config(**(bounds if issubclass(loss.config, ClipConfig) else {})),
        agg_mode=agg_mode,
        loss_scale_factor=PADDED_WIDTH,
    )
    logprobs_T = VECTORS["inputs/logprobs"].clone().requires_grad_()
    inputs = PolicyLossInputs(
        logprobs_T=logprobs_T,
        old_logprobs_T=VECTORS["inputs/old_logprobs"],
        advantages_T=VECTORS["adv/real/grpo"],
        segments=reference_segments(),
    )
    objective, metrics = actor_objective(inputs, denominators=DENOMINATORS, spec=spec)
    objective.backward()
    expected = VECTORS[f"loss/{name}/value"]
    assert torch.allclose(objective, expected, rtol=0, atol=TOLERANCE)
    expected_T = VECTORS[f"loss/{name}/grad"]
    assert logprobs_T.grad is not None
    assert torch.allclose(logprobs_T.grad, expected_T, rtol=0, atol=TOLERANCE)
    if loss_mode != "gpg":
        numbers = to_floats(metrics)
        expected_kl = float(VECTORS[f"loss/{name}/ppo_kl"])
        assert numbers["actor/ppo_kl"] == pytest.approx(expected_kl, abs=METRIC_TOLERANCE)
        # The reference counts, for geo_mean, also the side that does not bind, and for cispo the
        # tokens that PPO's clip would silence.
        if loss_mode not in ("geo_mean", "cispo", "sapo"):
            expected_frac = float(VECTORS[f"loss/{name}/clip_frac"])
            assert numbers["actor/clip_frac"] == pytest.approx(expected_frac, abs=METRIC_TOLERANCE)


@pytest.mark.parametrize("kind", names("kl/"))
def test_kl_and_gradient_equal_the_reference(kind):
    logprobs_T = VECTORS["inputs/logprobs"].clone().requires_grad_()
    kl_T = kl_penalty(logprobs_T, VECTORS["inputs/ref_logprobs"], kind)
    kl_T.sum().backward()
    assert torch.allclose(kl_T, VECTORS[f"kl/{kind}/value"], rtol=0, atol=TOLERANCE)
    assert logprobs_T.grad is not None
    assert torch.allclose(logprobs_T.grad, VECTORS[f"kl/{kind}/grad"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", [mode for mode in AGG_MODES if mode != "token-sum"])
def test_aggregation_equals_the_reference(mode):
    weights_T = token_weights(mode, reference_segments(), DENOMINATORS, PADDED_WIDTH)
    value = (weights_T * VECTORS["adv/real/grpo"]).sum()
    assert torch.allclose(value, VECTORS[f"agg/{mode}"], rtol=0, atol=TOLERANCE)


def test_the_file_covers_what_the_tests_claim():
    modes = [name.split("/")[0] for name in names("loss/")]
    assert {mode: modes.count(mode) for mode in modes} == dict.fromkeys(
        ("vanilla", "geo_mean", "gpg", "gspo", "cispo"), 12
    ) | {"sapo": 2}  # which has one aggregation and no clip
    for rewards in ("binary", "real"):
        found = {
            k.removeprefix(f"adv/{rewards}/") for k in VECTORS if k.startswith(f"adv/{rewards}")
        }
        assert found == ESTIMATORS.keys()
    assert names("kl/") == ["abs", "kl", "low_var_kl", "mse"]
