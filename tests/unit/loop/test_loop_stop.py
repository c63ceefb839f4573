"""A run that is asked to end saves what it has, does no update twice, and goes on to the same
numbers."""

from __future__ import annotations

import itertools

import pytest

from mcore_rl.loop.checkpoints import POINTER
from mcore_rl.loop.stop import Stop
from tests.unit.loop.test_loop_checkpoints import OVERRIDES, STEPS

# Asked as the call begins: (method, number), the checkpoint that is left, and of how many steps the
# updates are done. The engines validate before steps 0 and 2 and after the last, so call 0 of
# "generate" is the check of agreement, 1 and 4 and 7 are validations.
ASKED = [
    ("generate", 1, 0),
    ("generate", 2, 0),
    ("actor.logprobs", 1, 0),
    ("actor.begin_step", 0, 1),
    ("actor.update", 0, 1),
    ("actor.update", 1, 1),
    ("send_weights", 1, 1),
    ("generate", 3, 1),
    ("actor.logprobs", 2, 1),
    ("actor.ref_logprobs", 1, 1),
    ("actor.update", 2, 2),
    ("generate", 4, 2),
    ("generate", 5, 2),
    ("generate", 6, 3),
    ("actor.update", 7, 4),
    ("generate", 7, 4),
]
SETTINGS = {
    "saved every step": ["trainer.save_freq=1"],
    "saved at the end": ["trainer.save_freq=100"],
    "saved meanwhile": ["trainer.save_freq=1", "trainer.async_save=true"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from tests.unit.loop.loop_runs import run_in

    return run_in(tmp_path_factory.mktemp("whole"), *OVERRIDES, steps=STEPS, num_val=3)


@pytest.mark.parametrize(
    ("setting", "method", "number", "step"),
    [(name, *asked) for name, asked in zip(itertools.cycle(SETTINGS), ASKED)]
    + [(name, "actor.begin_save", 0, 1) for name in SETTINGS if name != "saved at the end"],
)
def test_a_run_that_is_asked_to_end_at_any_call_does_no_update_twice(
    run_loop, whole, setting, method, number, step
):
    overrides = [*OVERRIDES, *SETTINGS[setting]]
    how = {"steps": STEPS, "num_val": 3}
    stopped = run_loop(*overrides, **how, ask_at=(method, number), save_takes=1)
    assert stopped.is_stopped
    pointer = stopped.folder / "checkpoints" / POINTER
    assert (int(pointer.read_text()) if pointer.exists() else 0) == step
    assert [line["step"] for line in stopped.metrics] == list(range(step))
    again = run_loop(*overrides, **how)
    assert not again.is_stopped
    updates = [run.counts["actor.update"] for run in (stopped, again)]
    assert updates == [2 * step, 2 * (STEPS - step)]
    assert again.metrics == whole.metrics
    assert again.lines("samples.jsonl") == whole.lines("samples.jsonl")
    assert again.workers.actor.weights.equal(whole.workers.actor.weights)


def test_the_checkpoint_of_a_step_that_was_given_up_holds_what_it_began_with(run_loop, whole):
    """Its draws and its KL coefficient are those before it, though they had moved on."""
    overrides = [*OVERRIDES, "trainer.save_freq=100"]
    how = {"steps": STEPS, "num_val": 3}
    stopped = run_loop(*overrides, **how, ask_at=("actor.ref_logprobs", 2))
    assert stopped.checkpoints == ["global_step_2", POINTER]
    found, wanted = (
        (run.folder / "checkpoints" / "global_step_2" / "controller.json").read_text()
        for run in (stopped, whole)
    )
    assert found == wanted


def test_engines_are_asked_for_nothing_after_the_run_was(run_loop):
    """What the step generates beside its first batch is not begun."""
    overrides = [*OVERRIDES, "trainer.save_freq=100"]
    stopped = run_loop(*overrides, steps=STEPS, num_val=3, ask_at=("generate", 3))
    calls = stopped.calls[stopped.calls.index("actor.begin_save") - 1 :]
    assert calls == [
        "generate with 1",
        "actor.begin_save",
        "actor.save_state",
        "actor.finish_save",
    ]


@pytest.mark.parametrize("method", ["send_weights", "loaded_digests"])
def test_a_run_asked_to_end_before_its_loop_trains_nothing(run_loop, method):
    stopped = run_loop(*OVERRIDES, steps=STEPS, num_val=3, ask_at=(method, 0))
    assert stopped.is_stopped
    assert stopped.counts["generate"] == 0
    assert stopped.counts["actor.begin_save"] == 0


def test_work_that_is_named_after_the_run_was_asked_is_interrupted_too():
    stop, calls = Stop(), itertools.count()
    stop.ask()

    def interrupt():
        next(calls)

    stop.interrupts(interrupt)
    assert next(calls) == 1
