"""Groups of a step: dynamic sampling, greedy baselines, penalties, corrections, on fake workers."""

from __future__ import annotations

from collections import Counter

import pytest

from mcore_rl.errors import UserError

ALIKE_W1 = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    # All samples of every fourth prompt, and some of the others, score the same.
    acc = float(ground_truth != "w1" and solution_str.split().count("w11") > 0)
    return {"score": acc, "acc": acc}
"""
FILTER = "algorithm.filter_groups.enable=true"


def trained(run, step):
    """Return the sequences of the two updates of a step."""
    return [s for update in run.updates[2 * step : 2 * step + 2] for s in update]


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach(run_loop):
    run = run_loop(FILTER, "algorithm.filter_groups.metric=acc", steps=3, reward=ALIKE_W1)
    for step, line in enumerate(run.metrics):
        assert line["reward/zero_std_group_frac"] == 0
        assert len(trained(run, step)) == 4 * 3
        assert line["rollout/num_gen_batches"] >= 2  # every fourth prompt is dropped: 4 never do
        assert line["rollout/kept_group_frac"] < 1
    batches = sum(line["rollout/num_gen_batches"] for line in run.metrics)
    assert run.counts["generate"] == 1 + batches  # one belongs to the agreement check


def test_groups_that_never_differ_stop_the_run_after_the_batches_it_may_take(run_loop):
    never = "def compute_score(**sample): return 0.0"
    limit = "algorithm.filter_groups.max_num_gen_batches=5"
    with pytest.raises(UserError) as caught:
        run_loop(FILTER, limit, steps=1, reward=never)
    assert str(caught.value).startswith(
        "algorithm.filter_groups.max_num_gen_batches=5 batches of step 0 gave 0 of 4 groups whose "
        "samples differ; of the rewards, 20 groups only 0. Raise it,"
    )


def test_groups_that_never_differ_stop_the_run_after_one_pass_over_the_data(run_loop):
    """Ten prompts, four at a time; the reason is in the message."""
    never = "def compute_score(ground_truth, **sample): return float(ground_truth == 'w1')"
    with pytest.raises(UserError) as caught:
        run_loop(FILTER, steps=1, reward=never)
    text = str(caught.value)
    assert text.startswith(
        "algorithm.filter_groups.max_num_gen_batches=0 lets a step draw 1 pass over the 10 "
        "prompts, and the 3 batches of step 0 gave 0 of 4 groups whose samples differ; of the "
        "rewards, "
    )
    assert " groups only 0, " in text
    assert " groups only 1. Fix the reward if it never differs; " in text


def test_groups_that_seldom_differ_stop_the_run_after_three_passes(run_loop, tmp_path):
    """The first group of all differs, and no other."""
    reward = """
import itertools
CALLS = itertools.count()
def compute_score(**sample): return float(next(CALLS) == 0)
"""
    with pytest.raises(UserError, match=r"lets a step draw 3 passes .* 8 batches .* 1 of 4 groups"):
        run_loop(FILTER, steps=1, reward=reward)


def test_the_deviation_of_rewards_is_that_of_all_batches_of_the_step(run_loop):
    """Rewards are 0 in the first batch, 1 in the second, and differ in the third: the mean of the
    deviations would be next to nothing."""
    reward = """
import itertools
CALLS = itertools.count()
def compute_score(**sample):
    number = next(CALLS)
    return float(number >= 12) if number < 24 else float(number % 2)
"""
    run = run_loop(FILTER, steps=1, reward=reward)
    line = run.metrics[0]
    assert line["rollout/num_gen_batches"] == 3
    assert line["reward/mean"] == 0.5
    assert line["reward/std"] == 0.5


def test_batches_have_the_size_asked_for_and_a_prompt_that_comes_again_is_answered_anew(run_loop):
    # 10 prompts and at least 4 batches of 3: one prompt or more comes twice.
    run = run_loop(FILTER, "data.gen_batch_size=3", steps=1, reward=ALIKE_W1)
    assert run.metrics[0]["rollout/num_gen_batches"] >= 2
    sizes = [sum(map(len, of_call)) for of_call in run.requests[1:]]
    assert sizes == [9] * int(run.metrics[0]["rollout/num_gen_batches"])
    requests = [r for of_call in run.requests[1:] for of_rank in of_call for r in of_rank]
    assert max(Counter(r.sampling.seed for r in requests).values()) == 1


@pytest.mark.parametrize(
    "crash_at", [("generate", 3), ("actor.update", 2), ("actor.begin_save", 1)]
)
def test_a_run_with_dynamic_sampling_resumes_to_the_same_numbers(run_loop, crash_at):
    options = [FILTER, "data.gen_batch_size=3", "trainer.save_freq=1"]
    whole = run_loop(*options, steps=3, reward=ALIKE_W1, folder="whole")
    run_loop(*options, steps=3, reward=ALIKE_W1, crash_at=crash_at)
    resumed = run_loop(*options, steps=3, reward=ALIKE_W1)
    assert resumed.metrics == whole.metrics
    assert resumed.lines("samples.jsonl") == whole.lines("samples.jsonl")
    assert resumed.workers.actor.weights.equal(whole.workers.actor.weights)


def test_remax_answers_every_prompt_once_more_greedily(run_loop):
    run = run_loop("algorithm.adv_estimator=remax", steps=2)
    _, sampled, greedy, *_ = [
        [r for of_rank in of_call for r in of_rank] for of_call in run.requests
    ]
    assert len(sampled) == 4 * 3
    assert {r.sampling.temperature for r in sampled} == {1.0}
    assert [r.sampling.temperature for r in greedy] == [0.0] * 4
    prompts = {tuple(r.prompt_token_ids) for r in greedy}
    assert prompts == {tuple(r.prompt_token_ids) for r in sampled}
    # The policy prefers w11, which no prompt asks for: six words, no hit.
    assert run.metrics[0]["reward/baseline/mean"] == pytest.approx(-0.6)
    assert len(trained(run, 0)) == 4 * 3  # the greedy ones do not train
    # Six right words score 5.4, against -0.6.
    assert 0 < run.metrics[0]["advantage/max"] <= 6.0


def test_an_overlong_response_is_penalized_in_training_alone(run_loop):
    buffer = ["reward.overlong_buffer.enable=true", "reward.overlong_buffer.len=2"]
    constant = "def compute_score(**sample): return 1.0"
    run = run_loop(*buffer, "data.val_files=unread", steps=1, num_val=2, reward=constant)
    line = run.metrics[0]
    assert line["reward/mean"] == 1.0
    assert -1 <= line["reward/overlong_penalty"] < 0
    assert line["advantage/abs_mean"] > 0  # the penalty is all that differs
    assert line["eval/val/accuracy"] == 1.0


def test_truncated_samples_do_not_train_with_overlong_filtering(run_loop):
    run = run_loop("algorithm.overlong_filtering=true", steps=2)
    for step, line in enumerate(run.metrics):
        sequences = trained(run, step)
        untrained = [s for s in sequences if s.num_trained_tokens == 0]
        assert len(untrained) / len(sequences) == pytest.approx(line["rollout/truncated_frac"])
        assert 0 < len(untrained) < len(sequences)


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (["actor.policy_loss.loss_mode=gpg", "algorithm.adv_estimator=gpg"], 1),
        (["actor.ppo_mini_batch_size=4"], 0),
    ],
)
def test_a_correction_has_old_logprobs_in_every_update(run_loop, overrides, passes):
    correction = "algorithm.rollout_correction.rollout_is=token"
    run = run_loop(*overrides, correction, steps=1)
    assert run.counts["actor.logprobs"] == 1 + passes
    assert all(s.rollout_logprobs is not None for update in run.updates for s in update)
    assert run.metrics[0]["mismatch/is_clipped_frac"] == 0


def test_a_correction_weighs_by_how_far_the_engine_is_off(run_loop):
    """With a bound of 1/2 on every weight the gradient of one step halves, and nothing else."""
    one_update = ["actor.ppo_mini_batch_size=4", "trainer.total_training_steps=1"]
    section = "algorithm.rollout_correction"
    halved = [f"{section}.rollout_is=token", f"{section}.rollout_is_threshold=0.5"]
    plain = run_loop(*one_update, steps=1, folder="plain")
    corrected = run_loop(*one_update, *halved, steps=1, folder="corrected")
    norms = [run.metrics[0]["actor/grad_norm"] for run in (plain, corrected)]
    # float32, one halving: exact but for the last bits of the sums.
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-5)
    assert corrected.metrics[0]["mismatch/is_clipped_frac"] == 1
