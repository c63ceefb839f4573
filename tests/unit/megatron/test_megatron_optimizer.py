"""The optimizer through the worker: AdamW's formula, clipping, the schedule and the guard."""

import math
from dataclasses import replace

import pytest
import torch

from mcore_rl.algorithms.objectives import SftObjective
from mcore_rl.data.packing import SequenceCount
from mcore_rl.megatron.config import OptimConfig
from tests import actor_cases
from tests.actor_inputs import EP2, ONE_MICRO_BATCH, actor_spec, random_sequences
from tests.carriers import make_sequence
from tests.unit.megatron.optimizer_cases import PoisonedObjective

SFT = SftObjective()
SEQUENCES = random_sequences(1)
STEP = [("begin_step",), ("update", SEQUENCES, SFT)]


@pytest.fixture
def run(processes, tiny_checkpoint):
    """Return a function: (script, world_size, **spec) -> answers of the first rank."""

    def go(script, world_size=1, checkpoint="qwen3", **options):
        spec = actor_spec(tiny_checkpoint(checkpoint), **options)
        cut = SequenceCount(num_sequences=2)
        return processes.run(actor_cases.run_script, world_size, spec, script, cut)[0]

    return go


@pytest.fixture
def gradients(processes, tiny_checkpoint):
    """Return the gradient of SFT on SEQUENCES by Hugging Face name, before clipping."""
    spec = actor_spec(tiny_checkpoint("qwen2"))
    return processes.run(actor_cases.gradients, 1, spec, SEQUENCES, SFT, ONE_MICRO_BATCH)[0][0]


def norm_of(gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


@pytest.mark.parametrize("clipped", [True, False])
def test_the_first_update_is_adamws_of_the_clipped_gradient(run, gradients, clipped):
    """w1 = w0 - lr * (decay * w0 + g / (|g| + eps)), with g cut to the norm; norms and biases do
    not decay. The reported norm is that before clipping."""
    norm = norm_of(gradients)
    grad_clip = norm / 3 if clipped else norm * 3
    optim = OptimConfig(lr=0.02, eps=0.01, weight_decay=0.5)
    start, _, (metrics, weights, _) = run(
        [("begin_step",), *STEP], checkpoint="qwen2", optim=optim, grad_clip=grad_clip
    )
    # float32, a root of a sum over 15000 squares; observed 1.6e-8.
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-6)
    factor = min(1.0, grad_clip / (norm + 1e-6))
    for name, gradient in gradients.items():
        before, gradient = start[1][name].double(), factor * gradient.double()
        decay = 0.5 if before.dim() > 1 else 0.0
        expected = before - 0.02 * (decay * before + gradient / (gradient.abs() + 0.01))
        # float32 weights of size 1, gradients that differ by rounding; observed 2.2e-7.
        torch.testing.assert_close(weights[name].double(), expected, rtol=0, atol=1e-6)


def test_clipping_scales_the_gradient_and_zero_turns_it_off(run, gradients):
    """Adam's first moments are 0.1 times the gradient that it was given."""
    norm = norm_of(gradients)
    moments = {}
    for grad_clip in (0.0, norm / 4, norm * 4):
        _, (_, _, (_, found)) = run(STEP, checkpoint="qwen2", grad_clip=grad_clip)
        moments[grad_clip] = torch.cat([m.flatten() for m in found[::2]]).double()
    # float32; 1e-6 is added to the norm. Observed 2.8e-8 and 2.8e-9 of moments up to 0.03.
    assert float(moments[0.0].norm()) == pytest.approx(0.1 * norm, rel=1e-6)
    torch.testing.assert_close(moments[norm / 4], moments[0.0] / 4, rtol=1e-5, atol=1e-9)
    assert torch.equal(moments[norm * 4], moments[0.0])


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("checkpoint", "world_size", "megatron"), [("qwen3", 1, {}), ("qwen3_moe", 2, EP2)]
)
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(
    run, checkpoint, world_size, megatron, factor
):
    """Also where one rank alone has it: all ranks skip the update, count it, and the next one is
    that of a run in which the bad minibatch never came."""
    others = [replace(sequence, advantages=None) for sequence in SEQUENCES[:3]]
    assert all(60 not in sequence.token_ids for sequence in others)
    bad = make_sequence(token_ids=[60, 1, 2], loss_mask=[False, True, True])
    spoilt = ("update", [bad, *others], PoisonedObjective(token_id=60, factor=factor))
    options = {"checkpoint": checkpoint, "world_size": world_size, **megatron}
    good = run([("begin_step",), STEP[1], STEP[1]], **options)
    answers = run([("begin_step",), STEP[1], spoilt, STEP[1], spoilt], **options)
    for before, after in ((answers[1], answers[2]), (answers[3], answers[4])):
        metrics, weights, (steps, moments) = after
        assert metrics["actor/num_skipped_updates"] == 1
        assert "actor/grad_norm" not in metrics
        assert all(torch.equal(weights[name], before[1][name]) for name in weights)
        assert steps == before[2][0]
        assert len(moments) > 0
        assert all(map(torch.equal, moments, before[2][1]))
    metrics, weights, (steps, moments) = answers[3]
    assert metrics == good[2][0]
    assert metrics["actor/num_skipped_updates"] == 0
    assert all(torch.equal(weights[name], good[2][1][name]) for name in weights)
    assert steps == good[2][2][0]
    assert all(map(torch.equal, moments, good[2][2][1]))


def test_a_minibatch_without_trained_tokens_has_gradient_zero(run):
    untrained = [replace(s, loss_mask=[False] * len(s.token_ids)) for s in SEQUENCES]
    metrics, weights, _ = run([("begin_step",), ("update", untrained, SFT)])[1]
    assert metrics["actor/grad_norm"] == 0
    assert metrics["sft/loss"] == 0
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_run_whose_first_update_was_skipped_can_be_saved_and_goes_on(run, tmp_path):
    """No moments exist yet when the checkpoint is written."""
    spoilt = ("update", SEQUENCES, PoisonedObjective(SEQUENCES[0].token_ids[0], math.nan))
    expected = run([("begin_step",), ("begin_step",), STEP[1]])[-1]
    run([("begin_step",), spoilt, ("begin_save", str(tmp_path)), ("end_save",)])
    metrics, weights, _ = run([("load", str(tmp_path)), *STEP])[-1]
    assert metrics == expected[0]
    assert all(torch.equal(weights[name], expected[1][name]) for name in weights)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"lr_warmup_steps": 4}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        (
            {"lr_decay_style": "linear", "lr_decay_steps": 5, "min_lr": 0.002},
            [1 - 0.75 * n / 5 for n in (0, 1, 2, 3, 4, 5)],
        ),
        (
            {"lr_decay_style": "cosine", "lr_warmup_steps": 2, "min_lr": 0.0008},
            [1 / 2, 1, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 9)) for n in range(1, 5))],
        ),
        # The last step of a run still trains; only the one after it would have min_lr=0.
        ({"lr_decay_style": "linear"}, [1 - n / 10 for n in range(10)]),
        (
            {"lr_decay_style": "linear", "lr_warmup_steps": 2},
            [1 / 2, 1, *(1 - n / 9 for n in range(1, 9))],
        ),
    ],
)
def test_the_learning_rate_follows_its_schedule_once_per_step(run, optim, expected):
    """Two updates in every step have its rate; the whole is 10 steps unless lr_decay_steps says
    otherwise."""
    lr = 0.008
    script = [("begin_step",), STEP[1], STEP[1]] * len(expected)
    answers = run(script, optim=OptimConfig(lr=lr, **optim))
    found = [metrics["actor/lr"] for metrics, *_ in answers if metrics]
    # float64 arithmetic on Python numbers.
    assert found == pytest.approx([lr * part for part in expected for _ in range(2)], rel=1e-9)


def test_bfloat16_weights_have_float32_masters(run):
    """Updates of 0.001 are lost one by one in bfloat16 norms of size 1, whose neighbours are 0.004
    or 0.008 away; in the masters they add up."""
    optim = OptimConfig(lr=0.001, weight_decay=0.0)
    answers = run(STEP * 20, optim=optim, dtype="bfloat16")
    name = "model.norm.weight"
    first, last = answers[0][1][name], answers[-1][1][name]
    large = first > 1
    assert first.dtype == torch.bfloat16
    assert large.sum() > 5
    assert torch.equal(answers[1][1][name][large], first[large])
    assert (last[large] != first[large]).float().mean() > 0.5
