"""What leaves and comes when a run enters a phase, and which phase each verb enters."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import done
from mcore_rl.cluster.phases import NEEDS, EngineNeeds, Phase, Phases, away
from mcore_rl.cluster.placement import colocated, engines_apart
from mcore_rl.data.packing import TokenBudget
from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import EnginePart
from mcore_rl.types import Layout, Offloads, Part, TokenNumbers, WriteState
from mcore_rl.workers.roles import Actor, Critic, EngineProcess, Rollout, SentWeights, WeightSource
from tests.carriers import make_sequence

PARAM, GRAD, OPTIMIZER, REFERENCE = Part
TRAINED = frozenset({PARAM, GRAD, OPTIMIZER})
EVERYTHING = Offloads(actor=frozenset(Part), critic=TRAINED)
CUT = TokenBudget(max_tokens=64)
SEQUENCES = [make_sequence(token_ids=[1, 2, 3], loss_mask=[False, True, True])]


ROLES = Actor, Critic, Rollout, WeightSource, EngineProcess


class RoomWorkers:
    """A `WorkerGroup` that keeps what each model has on the device and refuses what moves twice.

    `moves` has (role, "offload" or "restore", parts) in order, and the name of every other call
    with what was away at the time.
    """

    world_size = 2
    step = None

    def __init__(self, offloads):
        self.away = {Actor: set(offloads.actor), Critic: set(offloads.critic)}
        self.moves = []

    def submit(self, calls) -> dict[int, Any]:
        assert set(calls) == {0, 1}, "all ranks move together"
        method, args = calls[0].method, calls[0].args
        role: Any = next(r for r in ROLES if method in vars(r).values())
        if method in (Actor.offload, Critic.offload, Actor.restore, Critic.restore):
            (parts,), away = args, self.away[role]
            assert parts
            leaves = method is role.offload
            assert away.isdisjoint(parts) if leaves else away.issuperset(parts)
            (away.update if leaves else away.difference_update)(parts)
            self.moves.append((role, method.__name__, list(parts)))
        else:
            self.moves.append((method, {r: frozenset(parts) for r, parts in self.away.items()}))
        empty, numbers = numbers_of([], []), numbers_of([0], [3])
        forwards = Actor.logprobs, Actor.ref_logprobs, Critic.values
        by_rank = [None, None]
        if method in forwards:
            by_rank = [numbers, empty]
        elif method in (Actor.update, Critic.update):
            by_rank = [{}, {}]
        elif method is WeightSource.send_weights:
            by_rank = [SentWeights({}, {})] * 2
        elif method in (Actor.save_state, Critic.save_state):
            by_rank = [WriteState(is_done=True)] * 2
        elif method is Actor.record_logprobs:
            by_rank = [(numbers, {0: None}), (empty, {})]
        elif method is Actor.layer_outputs:
            by_rank = [{0: {}}, {}]
        elif method is Rollout.generate:
            by_rank = [[], []]
        return {rank: done(answer) for rank, answer in enumerate(by_rank)}


def numbers_of(indices, lengths):
    numbers = np.zeros(sum(lengths), np.float32)
    return TokenNumbers(indices=np.array(indices), lengths=np.array(lengths), numbers=numbers)


def cluster_with(offloads):
    placement = colocated(Layout(dp=2), 2, engine_size=1)
    workers: Any = RoomWorkers(offloads)
    return Cluster.of(workers, placement, CUT, CUT, offloads=offloads), workers


VERBS = {
    "generate": lambda cluster, _: cluster.engines.generate([]),
    "sync_weights": lambda cluster, _: cluster.engines.sync_weights(1),
    "logprobs": lambda cluster, _: cluster.trainer.logprobs(SEQUENCES),
    "record_logprobs": lambda cluster, _: cluster.trainer.record_logprobs(SEQUENCES),
    "layer_outputs": lambda cluster, _: cluster.trainer.layer_outputs(SEQUENCES),
    "ref_logprobs": lambda cluster, _: cluster.trainer.ref_logprobs(SEQUENCES),
    "values": lambda cluster, _: cluster.trainer.values(SEQUENCES),
    "update": lambda cluster, _: cluster.trainer.update(SEQUENCES, None),
    "update_critic": lambda cluster, _: cluster.trainer.update_critic(SEQUENCES, None),
    "begin_save": lambda cluster, folder: cluster.trainer.begin_save(str(folder)),
    "load": lambda cluster, folder: cluster.trainer.load(str(folder)),
    "export_hf": lambda cluster, folder: cluster.trainer.export_hf(str(folder)),
}
HERE = {
    "generate": ({}, {}),
    "sync_weights": ({PARAM}, {}),
    "logprobs": ({PARAM}, {}),
    "record_logprobs": ({PARAM}, {}),
    "layer_outputs": ({PARAM}, {}),
    "ref_logprobs": ({REFERENCE}, {}),
    "values": ({}, {PARAM}),
    "update": (TRAINED, {}),
    "update_critic": ({}, TRAINED),
    "export_hf": ({PARAM}, {}),
}
"""What of (actor, critic) is on the device while a verb is done, where everything is offloaded."""


@pytest.mark.parametrize("before", ["generate", "update", "update_critic", "ref_logprobs"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_what_it_needs_and_nothing_else_whatever_came_before(verb, before, tmp_path):
    cluster, workers = cluster_with(EVERYTHING)
    VERBS[before](cluster, tmp_path)
    workers.moves.clear()
    VERBS[verb](cluster, tmp_path)
    calls = [move for move in workers.moves if len(move) == 2]
    if verb in ("begin_save", "load"):  # one model after the other
        expected = [
            (getattr(Actor, verb), {Actor: {GRAD, REFERENCE}, Critic: TRAINED}),
            (getattr(Critic, verb), {Actor: set(Part), Critic: {GRAD}}),
        ]
        assert calls == expected
    else:
        actor, critic = HERE[verb]
        [(_, found)] = calls
        assert found == {Actor: set(Part) - set(actor), Critic: TRAINED - set(critic)}


def test_what_leaves_is_gone_before_anything_comes():
    cluster, workers = cluster_with(EVERYTHING)
    cluster.phases.enter(Phase.TRAIN)
    cluster.phases.enter(Phase.TRAIN_CRITIC)
    everything = sorted(TRAINED)
    assert workers.moves == [
        (Actor, "restore", everything),
        (Actor, "offload", everything),
        (Critic, "restore", everything),
    ]


def test_a_step_moves_each_part_as_rarely_as_can_be(tmp_path):
    """generate, old and reference logprobs, two updates, sync: gradients and optimizer come and go
    once, weights once for the passes before the reference's and once for the rest."""
    cluster, workers = cluster_with(replace(EVERYTHING, critic=frozenset()))
    for verb in ("generate", "logprobs", "ref_logprobs", "update", "update", "sync_weights"):
        VERBS[verb](cluster, tmp_path)
    VERBS["generate"](cluster, tmp_path)
    moves = [(verb, parts) for role, verb, parts in (m for m in workers.moves if len(m) == 3)]
    assert moves == [
        ("restore", [PARAM]),
        ("offload", [PARAM]),
        ("restore", [REFERENCE]),
        ("offload", [REFERENCE]),
        ("restore", sorted(TRAINED)),
        ("offload", [GRAD, OPTIMIZER]),
        ("offload", [PARAM]),
    ]


def test_what_is_not_to_be_offloaded_never_moves(tmp_path):
    cluster, workers = cluster_with(Offloads())
    for verb in VERBS.values():
        verb(cluster, tmp_path)
    assert not [move for move in workers.moves if len(move) == 3]
    cluster, workers = cluster_with(Offloads(actor=frozenset({OPTIMIZER})))
    for verb in VERBS.values():
        verb(cluster, tmp_path)
    assert {tuple(parts) for _, _, parts in (m for m in workers.moves if len(m) == 3)} == {
        (OPTIMIZER,)
    }


class WorkersWithAnEngineApart(RoomWorkers):
    """Train workers 0 and 1, and an engine on rank 2 that fails when it is asked first."""

    num_failures = 1

    def submit(self, calls):
        if set(calls) == {0, 1}:
            return super().submit(calls)
        assert set(calls) == {2}
        self.moves.append((calls[2].method, None))
        if calls[2].method is Rollout.generate and self.num_failures:
            self.num_failures -= 1
            failed = Future()
            failed.set_exception(RolloutError("it died"))
            return {2: failed}
        return {2: done([] if calls[2].method is Rollout.answer else None)}

    def restart(self, rank):
        return done(None)

    def update_address(self, rank):
        return None


def test_an_engine_that_is_started_again_gets_weights_that_are_there():
    """They come back for it alone, and leave before it is asked again."""
    offloads = Offloads(actor=TRAINED)
    placement = engines_apart(Layout(dp=2), 2, 2, 0, 0)
    workers: Any = WorkersWithAnEngineApart(offloads)
    cluster = Cluster.of(workers, placement, CUT, max_engine_restarts=1, offloads=offloads)
    cluster.engines.sync_weights(1)
    assert cluster.engines.generate([[]]) == [[]]
    names = [move[1] if len(move) == 3 else move[0].__name__ for move in workers.moves]
    assert names == [
        *("restore", "receive_weights", "send_weights", "offload"),
        *("generate", "answer"),
        *("restore", "receive_weights", "send_weights", "offload"),
        *("generate", "answer"),
    ]


def test_the_reference_of_adapters_is_the_weights():
    offloads = Offloads(actor=TRAINED, reference=PARAM)
    assert away(Phase.REF_LOGPROBS, offloads) == (TRAINED - {PARAM}, frozenset())
    assert away(Phase.GENERATE, offloads) == (TRAINED, frozenset())


def test_a_phase_that_is_entered_again_moves_nothing():
    workers: Any = RoomWorkers(EVERYTHING)
    phases = Phases(workers, EVERYTHING)
    phases.enter(Phase.SYNC)
    phases.enter(Phase.SYNC)
    phases.enter(Phase.LOGPROBS)  # needs the same
    assert workers.moves == [(Actor, "restore", [PARAM])]


def test_every_phase_has_its_needs_and_engines_are_wanted_in_two():
    assert set(NEEDS) == set(Phase)
    wanted = {phase: needs.engine for phase, needs in NEEDS.items() if needs.engine.value}
    assert wanted == {
        Phase.GENERATE: EngineNeeds.ALL,
        Phase.SYNC: EngineNeeds.WEIGHTS,
        Phase.REVIVE: EngineNeeds.ALL,
    }


class SleepingWorkers(RoomWorkers):
    """Keeps what of the engines is awake, too, and their weights."""

    def __init__(self):
        super().__init__(Offloads())
        self.awake, self.has_weights, self.told = set(EnginePart), False, []

    def submit(self, calls):
        method, args = calls[0].method, calls[0].args
        if method is Rollout.sleep:
            assert self.awake
            self.awake, self.has_weights = set(), self.has_weights and args[0] == 1
        elif method is Rollout.wake:
            assert args[0] not in self.awake
            self.awake.add(args[0])
        elif method is WeightSource.send_weights:
            assert EnginePart.WEIGHTS in self.awake
            self.has_weights = True
        elif method is Rollout.generate:
            assert self.awake == set(EnginePart)
            assert self.has_weights
        elif method in (Actor.update, Actor.logprobs, Actor.begin_save):
            assert not self.awake
        self.told.append(method.__name__)
        return super().submit(calls)


def sleeping_cluster(level):
    workers: Any = SleepingWorkers()
    placement = colocated(Layout(dp=2), 2, engine_size=1)
    return Cluster.of(workers, placement, CUT, sleep_level=level), workers


@pytest.mark.parametrize("level", [1, 2])
def test_engines_sleep_while_the_trainer_works_and_wake_in_two_steps(level, tmp_path):
    cluster, workers = sleeping_cluster(level)
    cluster.engines.sync_weights(0)
    cluster.engines.generate([])
    assert workers.told == ["sleep", "wake", "send_weights", "wake", "generate"]
    workers.told.clear()
    cluster.trainer.logprobs(SEQUENCES)
    cluster.trainer.update(SEQUENCES, None)
    cluster.engines.sync_weights(1)
    assert workers.told == ["sleep", "logprobs", "update", "wake", "send_weights"]
    workers.told.clear()
    cluster.trainer.begin_save(str(tmp_path))
    cluster.engines.generate([])
    again = ["wake", "send_weights", "wake"] if level == 2 else ["wake", "wake"]
    assert workers.told == ["sleep", "begin_save", *again, "generate"]


def test_engines_that_forgot_their_weights_do_not_get_newer_ones_by_the_old_name():
    cluster, _ = sleeping_cluster(2)
    cluster.engines.sync_weights(0)
    cluster.trainer.update(SEQUENCES, None)
    with pytest.raises(RolloutError, match="weights 0 are wanted, which the trainer has left"):
        cluster.engines.generate([])


def test_engines_that_do_not_sleep_are_told_nothing():
    cluster, workers = sleeping_cluster(0)
    workers.has_weights = True
    cluster.engines.generate([])
    assert workers.told == ["generate"]
