"""The on-policy loop on fake workers: what it asks for, in which order, and what it logs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest

from mcore_rl.errors import RolloutError, UserError, WeightSyncError
from mcore_rl.rewards.base import BUILT_IN_NUMBERS
from mcore_rl.types import VersionSpan
from tests.unit.loop.fake_workers import VOCABULARY, UnigramEngine

GMPO = "actor.policy_loss.loss_mode=geo_mean"
GPG = ["algorithm.adv_estimator=gpg", "actor.policy_loss.loss_mode=gpg"]
ONE_UPDATE = "actor.ppo_mini_batch_size=4"


def test_a_step_of_two_updates_asks_for_these_calls_in_this_order(run_loop):
    run = run_loop(GMPO, steps=2)
    trained = ["actor.logprobs", "actor.begin_step", "actor.update", "actor.update"]
    assert run.calls == [
        "digests_of_model",
        "sync to 0",
        "loaded_digests",
        "generate with 0",  # the agreement check
        "actor.logprobs",
        "generate with 0",
        *trained,
        "sync to 1",
        "memory.take_peak",
        "generate with 1",
        *trained,
        "sync to 2",
        "memory.take_peak",
        "actor.begin_save",
        "actor.save_state",
        "actor.finish_save",
    ]


def test_loaded_weights_are_compared_only_if_wanted(run_loop):
    run = run_loop(GMPO, "rollout.compare_loaded_weights=false", steps=1)
    assert run.calls[:2] == ["sync to 0", "generate with 0"]


def test_a_failure_would_name_the_step_of_its_call(run_loop):
    workers = run_loop(GMPO, steps=2).workers
    assert workers.steps == [None] * 5 + [0] * 7 + [1] * 10


def test_samples_of_a_step_carry_the_version_of_its_weights(run_loop):
    run = run_loop(steps=3)
    assert [line["rollout/staleness/max"] for line in run.metrics] == [0.0, 0.0, 0.0]
    assert [engine.weight_version for engine in run.workers.engines] == [3, 3]


def test_engines_answer_with_the_weights_that_the_last_update_left(run_loop):
    """The trainer's old logprobs of each step equal what the engine said when it drew.

    Proves that a sync follows the updates of every step, not that real weights survive it.
    """
    run = run_loop(GMPO, steps=4)
    weights = [engine.weights for engine in run.workers.engines]
    assert all(weight.equal(run.workers.actor.weights) for weight in weights)
    # float32 on both sides, the same expression: 0.0 observed.
    assert max(line["mismatch/logprob_abs_diff/max"] for line in run.metrics) < 1e-6
    actor = run.workers.actor
    assert (actor.weights - actor.reference).abs().max() > 0.1  # and they did move


def test_the_reward_rises(run_loop):
    """Signs, masks and advantages end up right: the policy learns to say the rewarded word."""
    reward = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return solution_str.split().count("w3") / 6
"""
    run = run_loop(GMPO, "rollout.n=8", steps=20, reward=reward)
    rewards = [line["reward/mean"] for line in run.metrics]
    # 0.19 and 0.86 observed; 0.15 to 0.21 and 0.84 to 0.86 over three seeds.
    assert sum(rewards[:5]) / 5 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.7


@pytest.mark.parametrize(
    ("overrides", "with_old"),
    [
        ([GMPO], True),
        (["actor.policy_loss.loss_mode=gspo"], True),
        ([GMPO, ONE_UPDATE], False),
        ([GMPO, ONE_UPDATE, "actor.ppo_epochs=2"], True),
        (GPG, False),
        ([*GPG, "actor.ppo_epochs=2"], False),
    ],
)
def test_old_logprobs_are_computed_only_when_a_loss_reads_them_twice(run_loop, overrides, with_old):
    run = run_loop(*overrides, steps=1)
    assert run.counts["actor.logprobs"] == 1 + with_old  # one belongs to the agreement check
    for update in run.updates:
        for sequence in update:
            assert (sequence.old_logprobs is not None) == with_old


def test_skipping_the_pass_for_old_logprobs_changes_no_number(run_loop):
    """One update with and without it: the forward of the update gives the same logprobs.

    KL in the reward with coefficient 0 is what asks for the pass in the second run.
    """
    without = run_loop(GMPO, ONE_UPDATE, folder="without")
    forced = run_loop(
        *(GMPO, ONE_UPDATE, "algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0"),
        folder="with",
    )
    assert (without.counts["actor.logprobs"], forced.counts["actor.logprobs"]) == (1, 4)
    assert without.workers.actor.weights.equal(forced.workers.actor.weights)
    for mine, theirs in zip(without.metrics, forced.metrics, strict=True):
        assert {k: v for k, v in theirs.items() if not k.startswith("reward/kl")} == mine


def test_engine_logprobs_are_dropped_once_the_weights_moved_and_no_old_ones_are_there(run_loop):
    """Otherwise the distance of the second update would be reported as a mismatch."""
    first, second = run_loop(*GPG, steps=1).updates
    assert all(len(s.rollout_logprobs) == len(s.token_ids) for s in first)
    assert all(s.rollout_logprobs is None for s in second)
    for update in run_loop(GMPO, folder="kept", steps=1).updates:
        assert all(len(s.rollout_logprobs) == len(s.token_ids) for s in update)


def test_the_mismatch_of_a_loss_without_old_logprobs_stays_that_of_the_engine(run_loop):
    run = run_loop(*GPG, steps=3)
    # The weights move by units between the updates: without the drop this is above 0.1.
    assert max(line["mismatch/logprob_abs_diff/max"] for line in run.metrics) < 1e-6


def test_every_epoch_trains_on_the_same_minibatches_under_one_schedule_step(run_loop):
    run = run_loop(GMPO, "actor.ppo_epochs=3", steps=2)
    assert run.counts["actor.begin_step"] == 2
    assert len(run.updates) == 2 * 3 * 2
    tokens = [sorted(tuple(s.token_ids) for s in update) for update in run.updates]
    assert tokens[0:2] == tokens[2:4] == tokens[4:6] != tokens[6:8]
    assert run.metrics[0]["batch/tokens"] == 3 * sum(len(t) for u in tokens[0:2] for t in u)


def test_a_step_trains_on_every_sample_of_its_prompts_once(run_loop):
    run = run_loop(GMPO, steps=2)
    for step in range(2):
        sequences = [s for update in run.updates[2 * step : 2 * step + 2] for s in update]
        assert len(sequences) == 4 * 3
        num_response_tokens = sum(s.num_trained_tokens for s in sequences)
        mean = run.metrics[step]["rollout/response_tokens/mean"]
        # One rounding of a division by 12.
        assert mean * 12 == pytest.approx(num_response_tokens, rel=1e-12)


def test_a_kl_loss_asks_for_the_reference_and_not_for_the_old_pass(run_loop):
    run = run_loop(GMPO, ONE_UPDATE, "actor.use_kl_loss=true", steps=2)
    assert run.counts["actor.ref_logprobs"] == 2
    assert run.counts["actor.logprobs"] == 1
    assert all(len(s.ref_logprobs) == len(s.token_ids) for u in run.updates for s in u)
    kl = [line["actor/kl_loss"] for line in run.metrics]
    assert kl[0] == 0.0  # the policy still is the reference
    assert kl[1] > 1e-3


def test_kl_in_the_reward_is_taken_off_before_advantages_and_not_from_the_logged_score(run_loop):
    overrides = ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.5", ONE_UPDATE]
    run = run_loop(GMPO, *overrides, steps=2)
    plain = run_loop(GMPO, ONE_UPDATE, steps=2, folder="plain")
    assert run.calls[6:9] == ["actor.logprobs", "actor.ref_logprobs", "actor.begin_step"]
    first, second = run.metrics
    assert first["reward/kl"] == 0.0
    assert first["advantage/abs_mean"] == plain.metrics[0]["advantage/abs_mean"]
    assert second["reward/kl"] != 0.0
    assert second["reward/kl_coef"] == 0.5
    assert second["reward/mean"] == plain.metrics[1]["reward/mean"]  # drawn with equal weights
    assert second["advantage/abs_mean"] != plain.metrics[1]["advantage/abs_mean"]


def test_every_step_draws_new_responses_also_of_prompts_seen_before(run_loop):
    run = run_loop(GMPO, steps=4)  # two epochs
    requests = [[request for of_rank in of_call for request in of_rank] for of_call in run.requests]
    check, *seeds = [[request.sampling.seed for request in call] for call in requests]
    seeds = [*sorted(set(check)), *(seed for of_step in seeds for seed in of_step)]
    assert len(set(check)) == 8  # every engine is asked the same
    assert len(set(seeds)) == len(seeds)
    assert [len(call) for call in requests] == [8 * 2, *[4 * 3] * 4]


def test_sampling_while_training_follows_the_configuration(run_loop):
    run = run_loop(GMPO, "rollout.temperature=0.7", steps=1, num_val=2)
    agreement, validation, rollout, _ = run.requests
    for args in (agreement, rollout):
        sampling = args[0][0].sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 1.0, -1)
        assert sampling.max_tokens == 6
    assert validation[0][0].sampling.temperature == 0.0


@pytest.mark.parametrize(
    ("overrides", "logged"),
    [
        ([], [0, 5]),
        (["trainer.val_before_train=false"], [5]),
        (["trainer.test_freq=2"], [0, 2, 4, 5]),
        (["trainer.test_freq=5", "trainer.val_before_train=false"], [5]),
        (["trainer.test_freq=1"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_validation_is_logged_at_these_steps(run_loop, overrides, logged):
    run = run_loop(GMPO, *overrides, "data.val_files=unread", steps=5, num_val=3)
    steps = [line["step"] for line in run.metrics if "eval/val/accuracy" in line]
    assert steps == logged
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 3, 4, 5]
    assert run.counts["generate"] == 1 + 5 + len(logged)


def test_validation_of_a_step_reads_the_weights_of_that_step(run_loop):
    run = run_loop(GMPO, "trainer.test_freq=1", "data.val_files=unread", steps=3, num_val=4)
    generated = [call for call in run.calls if call.startswith("generate")]
    versions = [int(call.split()[-1]) for call in generated]
    assert versions == [0, 0, 0, 1, 1, 2, 2, 3]  # check, then validation and rollout, at last one


def test_the_last_line_holds_the_final_validation_and_no_update(run_loop):
    run = run_loop(GMPO, "data.val_files=unread", steps=2, num_val=2)
    last = run.lines("metrics.jsonl")[-1]
    assert last["step"] == 2
    assert {key.split("/")[0] for key in last} == {"step", "eval", "time"}
    assert {line["step"] for line in run.lines("samples.jsonl")} == {0, 1, 2}


def test_samples_of_every_validation_are_logged_and_told_from_those_of_training(run_loop):
    overrides = ["trainer.test_freq=2", "data.val_files=unread", "trainer.log_val_generations=2"]
    run = run_loop(GMPO, *overrides, steps=3, num_val=4)
    samples = run.lines("samples.jsonl")
    assert [(line["step"], line["split"]) for line in samples[::2]] == [
        (0, "val"),
        (0, "train"),
        (1, "train"),
        (2, "val"),
        (2, "train"),
        (3, "val"),
    ]
    assert [line["uid"].split(":")[0] for line in samples] == [line["split"] for line in samples]


def test_samples_of_training_carry_what_the_updates_read(run_loop):
    """The engine and the trainer of the fake have one model: they differ by rounding alone."""
    run = run_loop(GMPO, "trainer.log_val_generations=12", steps=1)
    sequences = [sequence for update in run.updates for sequence in update]
    for sample in run.lines("samples.jsonl"):
        tokens = sample["tokens"]
        assert len(tokens["texts"]) == len(tokens["rollout_logprobs"]) == sample["num_tokens"]
        assert all(abs(difference) < 1e-5 for difference in tokens["logprob_diffs"])
        assert sum(tokens["advantages"]["counts"]) == sample["num_tokens"]
        assert sample["versions"] == [[0, 0, sample["num_tokens"]]]
    advantages = {
        tuple(sample["tokens"]["advantages"]["values"]) for sample in run.lines("samples.jsonl")
    }
    trained = {float(f"{max(s.advantages, key=abs):.5g}") for s in sequences}
    assert advantages == {(value,) for value in trained}


def test_the_difference_of_tokens_is_not_measured_where_a_step_has_one_update(run_loop):
    run = run_loop(GMPO, ONE_UPDATE, steps=1)
    tokens = [sample["tokens"] for sample in run.lines("samples.jsonl")]
    assert [of["logprob_diffs"] for of in tokens] == [None] * len(tokens)
    assert all(of["advantages"]["values"] for of in tokens)


def test_without_validation_data_nothing_is_validated(run_loop):
    run = run_loop(GMPO, steps=2)
    assert run.counts["generate"] == 1 + 2
    assert [line["step"] for line in run.metrics] == [0, 1]


def test_validation_takes_batches_and_reports_the_best_of_several_samples(run_loop):
    overrides = [
        "data.val_files=unread",
        "data.val_batch_size=3",
        "rollout.val_kwargs.n=4",
        "rollout.val_kwargs.do_sample=true",
        "rollout.val_kwargs.temperature=0.9",
        "rollout.val_kwargs.top_p=0.8",
        "rollout.val_kwargs.top_k=5",
    ]
    run = run_loop(GMPO, *overrides, steps=1, num_val=5)
    first, second = run.requests[1:3]
    assert [sum(map(len, of_call)) for of_call in (first, second)] == [12, 8]
    sampling = first[0][0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.9, 0.8, 5)
    line = run.metrics[0]
    best = [line[f"eval/val/best_at_{k}"] for k in (1, 2, 4)]
    assert best == sorted(set(best))
    assert best[0] == pytest.approx(line["eval/val/accuracy"])
    assert line["eval/val/accuracy/std"] > 0
    # The reward gives no answers, and other scores than 0 and 1.
    assert not [key for key in line if "maj_at" in key or "pass_at" in key]


VOTES = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    first = (solution_str.split() or [None])[0]
    right = first == ground_truth
    return {"score": 2 * right - 1, "acc": right, "pred": first}
"""


def test_validation_reports_the_majority_and_the_chance_of_a_right_answer(run_loop):
    """Held against the samples: the score of what two of three state, of one of them otherwise."""
    overrides = [
        "data.val_files=unread",
        "rollout.val_kwargs.n=3",
        "rollout.val_kwargs.do_sample=true",
        "trainer.log_val_generations=120",
    ]
    run = run_loop(GMPO, *overrides, steps=1, num_val=40, reward=VOTES)
    line, samples = run.metrics[0], run.lines("samples.jsonl")[:120]
    expected = []
    for i in range(0, 120, 3):
        of_prompt = samples[i : i + 3]
        assert len({sample["uid"] for sample in of_prompt}) == 1
        score = {(s["response"].split() or [""])[0]: s["reward"] for s in of_prompt}
        votes = Counter((s["response"].split() or [""])[0] for s in of_prompt)
        silent = votes.pop("", 0)
        most = [answer for answer in votes if votes[answer] == max(votes.values())]
        expected.append(fmean(score[answer] for answer in most) if silent < 3 else -1)
    assert line["eval/val/maj_at_3"] == pytest.approx(fmean(expected))
    assert line["eval/val/maj_at_1"] == pytest.approx(line["eval/val/accuracy"])
    rights = [any(s["reward"] == 1 for s in samples[i : i + 3]) for i in range(0, 120, 3)]
    assert line["eval/val/pass_at_3"] == pytest.approx(fmean(rights))
    assert line["eval/val/pass_at_1"] == pytest.approx(line["eval/val/acc/mean"])
    assert line["eval/val/best_at_2"] == pytest.approx(2 * line["eval/val/pass_at_2"] - 1)
    assert 0 < line["eval/val/pass_at_1"] < line["eval/val/pass_at_2"] < fmean(rights) < 1


BUILT_IN = ("response_tokens/mean", "truncated_frac", "failed_frac", "timeout_frac")
FAILS_ON_W1 = """
import time
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source == "val" and ground_truth == "w1":
        raise ConnectionError("the judge is away")
    return 1.0
"""


def test_validation_counts_the_rewards_that_failed_and_the_responses_cut_off(run_loop):
    """Ground truths w1 to w4, so a quarter of the accuracy is lost to failures."""
    options = ["data.val_files=unread", "reward.on_error=zero", "reward.max_failed_frac=0.25"]
    run = run_loop(GMPO, *options, steps=1, num_val=4, reward=FAILS_ON_W1)
    for line in run.lines("metrics.jsonl"):
        assert line["eval/val/accuracy"] == 0.75
        assert line["eval/val/failed_frac"] == 0.25
        assert line["eval/val/timeout_frac"] == 0.0
        # Greedy, the policy repeats one word to the limit, at first.
        assert line["step"] > 0 or line["eval/val/truncated_frac"] == 1.0


def test_a_validation_whose_rewards_fail_too_often_stops_the_run(run_loop):
    """Counted over the whole of it, not by batches."""
    options = ["data.val_files=unread", "reward.on_error=zero", "data.val_batch_size=1"]
    with pytest.raises(UserError, match=r"max_failed_frac=0\.1 .* failed on 1 of 4 .* validation"):
        run_loop(GMPO, *options, steps=1, num_val=4, reward=FAILS_ON_W1)
    run_loop(GMPO, *options, "reward.max_failed_frac=0.3", steps=1, num_val=4, reward=FAILS_ON_W1)


def test_no_metric_of_a_run_has_the_form_of_a_rewards_own_but_those_that_rewards_may_not_name(
    run_loop,
):
    overrides = [
        "algorithm.adv_estimator=remax",
        "algorithm.use_kl_in_reward=true",
        "reward.overlong_buffer.enable=true",
        "reward.overlong_buffer.len=2",
        "data.val_files=unread",
    ]
    run = run_loop(*overrides, steps=1, num_val=2)
    keys = {key for line in run.lines("metrics.jsonl") for key in line}
    parts = [key.split("/") for key in keys if key.startswith(("reward/", "eval/"))]
    assert {part[-2] for part in parts if part[-1] == "mean" and len(part) > 2} == set(
        BUILT_IN_NUMBERS
    )


def test_validation_reports_the_further_numbers_of_a_reward(run_loop):
    """Each as the mean over the samples that have it; the score alone is the accuracy."""
    reward = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    number = int(ground_truth[1:])
    return {"score": number, "acc": 10 * number, ("accuracy", "odd")[number % 2]: number}
"""
    run = run_loop(GMPO, "data.val_files=unread", steps=1, num_val=4, reward=reward)
    for line in run.lines("metrics.jsonl"):
        numbers = {k.removeprefix("eval/val/"): v for k, v in line.items() if "eval/" in k}
        for name in BUILT_IN:
            del numbers[name]
        # Ground truths 1, 2, 3, 4; a number may have any name.
        expected = {"accuracy": 2.5, "acc/mean": 25.0, "odd/mean": 2.0, "accuracy/mean": 3.0}
        assert numbers == expected


def test_every_validation_draws_with_the_same_seeds(run_loop):
    run = run_loop(
        *(GMPO, "data.val_files=unread", "rollout.val_kwargs.do_sample=true"), steps=1, num_val=3
    )
    seeds = [
        sorted(r.sampling.seed for of_rank in of_call for r in of_rank) for of_call in run.requests
    ]
    assert seeds[1] == seeds[3] != seeds[2]


class PerturbedEngine(UnigramEngine):
    """Reports logprobs that are off by 0.01."""

    shift = 0.01

    def generate(self, requests):
        return [
            replace(result, logprobs=[*result.logprobs[:-1], result.logprobs[-1] + self.shift])
            for result in super().generate(requests)
        ]


class NanEngine(PerturbedEngine):
    shift = math.nan


class StaleEngine(UnigramEngine):
    """Takes every version and goes on answering for the first one."""

    def generate(self, requests):
        return [
            replace(result, versions=[VersionSpan(0, 0, len(result.token_ids))])
            for result in super().generate(requests)
        ]


class DeafEngine(UnigramEngine):
    """Ends a weight update without taking the version."""

    def finish_weight_update(self, manifest):
        super().finish_weight_update(manifest)
        self.weight_version = min(self.weight_version, 1)


def test_an_engine_that_disagrees_with_the_trainer_stops_the_run_before_any_update(run_loop):
    with pytest.raises(WeightSyncError, match=r"the largest by 0\.01, more than 0\.001") as caught:
        run_loop(GMPO, engine=PerturbedEngine)
    assert (caught.value.role, caught.value.step) == ("controller", 0)
    assert str(caught.value).endswith("in which layer: mcore-rl verify model --model unread")


@pytest.mark.parametrize("tolerance", ["0.02", "null"])
def test_the_tolerance_of_the_agreement_check_is_the_configured_one(run_loop, tolerance):
    overrides = [GMPO, f"rollout.logprob_tolerance={tolerance}", "actor.megatron.dtype=bfloat16"]
    run = run_loop(*overrides, engine=PerturbedEngine, steps=1)
    # In float32 log-probabilities around -2: the shift of 0.01 to 3e-8.
    assert run.metrics[0]["mismatch/logprob_abs_diff/max"] == pytest.approx(0.01, abs=1e-6)


def test_logprobs_that_are_no_numbers_do_not_pass_as_agreement(run_loop):
    with pytest.raises(
        RolloutError, match=r"log-probabilities that are NaN or above 0, .* weights 0\)"
    ):
        run_loop(GMPO, engine=NanEngine)


def test_the_agreement_check_asks_every_engine_and_leaves_the_data_where_it_was(run_loop):
    run = run_loop(GMPO, steps=1)
    check, rollout = run.requests
    by_engine = [[tuple(r.prompt_token_ids) for r in of_rank] for of_rank in check]
    assert by_engine[0] == by_engine[1]
    assert len(by_engine[0]) == 8
    drawn = {tuple(r.prompt_token_ids) for of_rank in rollout for r in of_rank}
    assert len(drawn) == 4


def test_answers_of_old_weights_are_refused(run_loop):
    with pytest.raises(RolloutError, match=r"tokens of the weights \[\(0, 0, \d\)\], not 1, while"):
        run_loop(GMPO, engine=StaleEngine)


def test_an_engine_that_does_not_take_a_version_stops_the_run(run_loop):
    with pytest.raises(WeightSyncError, match="reports weights 1 after a sync of 2"):
        run_loop(GMPO, engine=DeafEngine)


def test_two_runs_are_equal_in_every_metric_and_every_sample(run_loop):
    runs = [run_loop(GMPO, folder=name, num_val=3, steps=4) for name in ("a", "b")]
    assert runs[0].metrics == runs[1].metrics
    assert runs[0].lines("samples.jsonl") == runs[1].lines("samples.jsonl")
    other = run_loop(GMPO, "data.seed=1", folder="c", num_val=3, steps=4)
    assert other.metrics != runs[0].metrics


def test_times_of_the_stages_and_tokens_per_second_are_logged(run_loop):
    line = run_loop(GMPO, steps=1).lines("metrics.jsonl")[0]
    stages = ("rollout", "reward", "old_logprobs", "train", "weight_sync")
    assert all(line[f"time/{stage}"] > 0 for stage in stages)
    assert line["time/step"] >= sum(line[f"time/{stage}"] for stage in stages)
    # One float64 division.
    assert line["perf/tokens_per_s"] == pytest.approx(
        line["batch/tokens"] / line["time/step"], rel=1e-12
    )
    assert line["weight_sync/bytes"] == 4 * VOCABULARY


def test_losses_are_those_of_an_update_however_many_a_step_has(run_loop):
    """Nothing is learnt, so every epoch has the same loss."""
    once, thrice = (
        run_loop(*GPG, ONE_UPDATE, f"actor.ppo_epochs={n}", steps=1, learning_rate=0.0, folder=n)
        for n in ("1", "3")
    )
    for name in ("actor/pg_loss", "actor/loss"):
        # The rounding of a sum of three.
        assert thrice.metrics[0][name] == pytest.approx(once.metrics[0][name], rel=1e-12)
    assert abs(once.metrics[0]["actor/pg_loss"]) > 1e-3
    assert thrice.metrics[0]["batch/tokens"] == 3 * once.metrics[0]["batch/tokens"]
