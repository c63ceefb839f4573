"""The loop with a critic: what it asks for, warm-up, and a resume to the same numbers."""

from typing import Any

import pytest

from tests.sequences import sequences_of

GAE = "algorithm.adv_estimator=gae"


def test_values_come_before_the_advantages_and_the_critic_trains_first(run_loop):
    run = run_loop(GAE, "critic.ppo_mini_batch_size=4", "critic.ppo_epochs=3", steps=1)
    assert run.calls[6:] == [
        "actor.logprobs",
        "critic.values",
        "critic.begin_step",
        "critic.update",
        "critic.update",
        "critic.update",
        "actor.begin_step",
        "actor.update",
        "actor.update",
        "sync to 1",
        "memory.take_peak",
        "actor.begin_save",
        "critic.begin_save",
        "actor.save_state",
        "critic.save_state",
        "actor.finish_save",
        "critic.finish_save",
    ]


def test_the_critic_gets_values_and_returns_and_the_actor_does_not(run_loop):
    run = run_loop(GAE, steps=1)
    [(micro_batches, *_), *_] = run.arguments("critic.update")[0]
    of_critic: list[Any] = [s for mb in micro_batches for s in sequences_of(mb)]
    assert all(len(s.values) == len(s.returns) == len(s.token_ids) for s in of_critic)
    assert {s.advantages for s in of_critic} == {s.rollout_logprobs for s in of_critic} == {None}
    of_actor = [s for update in run.updates for s in update]
    assert {s.values for s in of_actor} == {s.returns for s in of_actor} == {None}


def test_the_actor_waits_for_the_warm_up_of_the_critic(run_loop):
    run = run_loop(GAE, "trainer.critic_warmup=2", steps=3)
    trained = ["actor/pg_loss" in line for line in run.metrics]
    assert trained == [False, False, True]
    assert run.counts["actor.begin_step"] == 1  # nor does its learning rate move
    assert run.counts["critic.begin_step"] == 3


def test_the_critic_learns_what_reward_to_expect(run_loop):
    run = run_loop(GAE, "trainer.critic_warmup=30", steps=30)
    losses = [line["critic/value_loss"] for line in run.metrics]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("crash_at", [("critic.values", 2), ("critic.finish_save", 1)], ids=str)
def test_a_run_with_a_critic_resumes_to_the_same_numbers(run_loop, crash_at):
    overrides = [GAE, "trainer.save_freq=1"]
    whole = run_loop(*overrides, steps=4, folder="whole")
    run_loop(*overrides, steps=4, folder="crashed", crash_at=crash_at)
    resumed = run_loop(*overrides, steps=4, folder="crashed")
    assert resumed.metrics == whole.metrics
    assert resumed.workers.critic.weights.equal(whole.workers.critic.weights)
