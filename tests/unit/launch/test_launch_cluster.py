"""The controller's view of its workers: shares go out, results come back in order."""

from __future__ import annotations

import pytest

from mcore_rl.data.packing import SequenceCount, TokenBudget
from mcore_rl.errors import CheckpointError
from mcore_rl.launch.cluster import Cluster
from mcore_rl.metrics import maximum, mean, to_floats
from mcore_rl.rollout.base import GenerationRequest, GenerationResult, SamplingParams
from mcore_rl.types import Layout, Place, TokenSequence, WriteState


class EchoWorkers:
    """A `WorkerGroup` whose results show what was asked of which rank."""

    def __init__(self, places):
        self.places = places
        self.world_size = len(places)
        self.step = None
        self.calls = []
        self.is_closed = False
        self.save_states = []

    def call(self, method, *args):
        return self.call_each(method, [args] * self.world_size)

    def call_each(self, method, args_of_rank):
        assert len(args_of_rank) == self.world_size
        self.calls.append((method, list(args_of_rank)))
        return [
            getattr(self, method.split(".")[-1])(rank, *args_of_rank[rank])
            for rank in range(self.world_size)
        ]

    def place(self, rank):
        return self.places[rank]

    def generate(self, rank, requests):
        assert self.places[rank].engine is not None or not requests
        return [
            GenerationResult(
                token_ids=[rank, *request.prompt_token_ids],
                logprobs=[],
                finish_reason="stop",
                weight_version=0,
            )
            for request in requests
        ]

    def sync_weights(self, rank, version):
        return {"weight_sync/bytes": maximum(100 + rank)}

    def logprobs(self, rank, micro_batches):
        if not self.places[rank].reports_tokens:
            return {}
        return {
            index: [float(token) for token in sequence.token_ids]
            for micro_batch in micro_batches
            for index, sequence in zip(micro_batch.indices, micro_batch.sequences, strict=True)
        }

    ref_logprobs = logprobs

    def update(self, rank, micro_batches, denominators, objective):
        if not self.places[rank].reports_tokens:
            return {}
        tokens = [s.num_trained_tokens for mb in micro_batches for s in mb.sequences]
        return {"actor/entropy": mean(float(rank), sum(tokens))}

    def begin_step(self, rank):
        pass

    def begin_save(self, rank, folder):
        pass

    load = export_hf = begin_save

    def save_state(self, rank, wait):
        return self.save_states[rank]

    def finish_save(self, rank):
        pass

    def close(self):
        self.is_closed = True


def places(dp=2, model_ranks=1, engines=None):
    """Return the places of dp x model_ranks ranks; the last rank of a model reports.

    `engines` has the number of each rank's engine, or None; by default each has its own.
    """
    world_size = dp * model_ranks
    engines = range(world_size) if engines is None else engines
    return [
        Place(
            dp_rank=rank // model_ranks,
            reports_tokens=rank % model_ranks == model_ranks - 1,
            engine=engines[rank],
        )
        for rank in range(world_size)
    ]


def make_cluster(places, cut=None, **layout):
    workers = EchoWorkers(places)
    layout = Layout(**{"dp": 2, **layout})
    return Cluster(workers, layout, cut or TokenBudget(max_tokens=64)), workers


def requests(num):
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=4, seed=0)
    return [GenerationRequest(prompt_token_ids=[100 + i], sampling=sampling) for i in range(num)]


def sequences(num):
    return [
        TokenSequence(token_ids=[i] * (2 + i % 5), loss_mask=[False] + [True] * (1 + i % 5))
        for i in range(num)
    ]


@pytest.mark.parametrize("num", [0, 1, 2, 7])
def test_requests_are_dealt_one_by_one_and_results_come_back_in_order(num):
    cluster, workers = make_cluster(places(dp=3), dp=3)
    results = cluster.generate(requests(num))
    assert [result.token_ids for result in results] == [[i % 3, 100 + i] for i in range(num)]
    method, shares = workers.calls[-1]
    assert method == "generate"
    assert len(shares) == 3  # every rank is asked, if only for nothing


def test_only_ranks_with_an_engine_get_requests():
    cluster, _ = make_cluster(places(dp=4, engines=[None, 0, None, 1]), dp=4)
    assert cluster.num_engines == 2
    results = cluster.generate(requests(5))
    assert [result.token_ids for result in results] == [
        [1, 100],
        [3, 101],
        [1, 102],
        [3, 103],
        [1, 104],
    ]


def test_all_ranks_of_an_engine_get_its_requests_and_the_first_one_answers():
    cluster, workers = make_cluster(places(dp=4, engines=[0, 0, 1, 1]), dp=4)
    assert cluster.num_engines == 2
    results = cluster.generate(requests(3))
    assert [result.token_ids for result in results] == [[0, 100], [2, 101], [0, 102]]
    [(first,), (same,), (second,), (also,)] = workers.calls[-1][1]
    assert [request.prompt_token_ids for request in first] == [[100], [102]]
    assert first == same
    assert [request.prompt_token_ids for request in second] == [[101]]
    assert second == also


@pytest.mark.parametrize("method", ["logprobs", "ref_logprobs"])
@pytest.mark.parametrize("model_ranks", [1, 2])
@pytest.mark.parametrize("num", [1, 2, 11])
def test_logprobs_come_back_by_sequence_whoever_computed_them(method, model_ranks, num):
    """Sequences are packed and sorted on the way; the values say which sequence they are of."""
    cluster, workers = make_cluster(
        places(dp=2, model_ranks=model_ranks), TokenBudget(max_tokens=12)
    )
    wanted = sequences(num)
    found = getattr(cluster, method)(wanted)
    assert found == [[float(token) for token in sequence.token_ids] for sequence in wanted]
    assert workers.calls[-1][0] == f"actor.{method}"


def test_ranks_of_one_model_get_the_same_micro_batches_and_models_get_different_ones():
    cluster, workers = make_cluster(places(dp=2, model_ranks=2), TokenBudget(max_tokens=12))
    cluster.update(sequences(11), "objective")
    _, shares = workers.calls[-1]
    assert shares[0] == shares[1]
    assert shares[2] == shares[3]
    assert shares[0][0] != shares[2][0]
    indices = [index for share in (shares[0], shares[2]) for mb in share[0] for index in mb.indices]
    assert sorted(indices) == list(range(11))


def test_an_update_carries_the_counts_of_the_whole_minibatch_to_every_rank():
    cluster, workers = make_cluster(places(dp=2))
    batch = sequences(7)
    metrics = to_floats(cluster.update(batch, "objective"))
    num_tokens = sum(s.num_trained_tokens for s in batch)
    for _, denominators, objective in workers.calls[-1][1]:
        assert (denominators.num_tokens, denominators.num_sequences) == (num_tokens, 7)
        assert objective == "objective"
    assert metrics["batch/tokens"] == sum(len(s.token_ids) for s in batch)
    by_rank = [
        sum(s.num_trained_tokens for mb in mbs for s in mb.sequences)
        for mbs, *_ in workers.calls[-1][1]
    ]
    # One rounding of a division.
    assert metrics["actor/entropy"] == pytest.approx(by_rank[1] / num_tokens, rel=1e-12)


def test_the_cut_that_was_given_is_kept():
    cluster, workers = make_cluster(places(dp=2), SequenceCount(num_sequences=2))
    cluster.update(sequences(7), None)
    micro_batches = [mb for mbs, *_ in workers.calls[-1][1] for mb in mbs]
    assert max(len(mb.sequences) for mb in micro_batches) == 2
    assert len(micro_batches) == 4


def test_an_interleaved_pipeline_gets_a_multiple_of_its_stages():
    for vpp, expected in ((1, 3), (2, 4)):
        cluster, workers = make_cluster(
            places(dp=1, model_ranks=2), SequenceCount(num_sequences=1), dp=1, pp=2, vpp=vpp
        )
        cluster.update(sequences(3), None)
        assert {len(mbs) for mbs, *_ in workers.calls[-1][1]} == {expected}


def test_syncs_and_folders_reach_every_rank(tmp_path):
    cluster, workers = make_cluster(places(dp=2))
    assert to_floats(cluster.sync_weights(4)) == {"weight_sync/bytes": 101.0}
    cluster.begin_step()
    cluster.begin_save(str(tmp_path))
    cluster.load("b")
    cluster.export_hf("c")
    assert workers.calls[1:] == [
        ("sync_weights", [(4,), (4,)]),
        ("actor.begin_step", [(), ()]),
        ("actor.begin_save", [(f"{tmp_path}/actor",)] * 2),
        ("actor.load", [("b/actor",)] * 2),
        ("actor.export_hf", [("c",), ("c",)]),
    ]


@pytest.mark.parametrize("wait", [False, True])
def test_a_checkpoint_is_completed_when_every_rank_has_written(wait):
    cluster, workers = make_cluster(places(dp=2))
    workers.save_states = [WriteState(is_done=True), WriteState(is_done=False)]
    assert not cluster.end_save(wait=wait)
    assert workers.calls[1:] == [("actor.save_state", [(wait,), (wait,)])]
    workers.save_states = [WriteState(is_done=True)] * 2
    assert cluster.end_save(wait=wait)
    assert workers.calls[-1] == ("actor.finish_save", [(), ()])


def test_the_first_rank_that_cannot_write_is_named():
    cluster, workers = make_cluster(places(dp=2))
    workers.save_states = [
        WriteState(is_done=False),
        WriteState(is_done=True, problem="a cannot be written: disk full"),
    ]
    cluster.enter_step(7)
    with pytest.raises(CheckpointError) as caught:
        cluster.end_save(wait=False)
    assert str(caught.value) == (
        "[role worker, actor.save, rank 1, step 7] a cannot be written: disk full"
    )
