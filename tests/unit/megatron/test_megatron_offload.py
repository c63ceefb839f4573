"""Storages that move to host memory and back, with whoever holds tensors of them."""

from __future__ import annotations

import pytest
import torch

from mcore_rl.errors import OffloadError
from mcore_rl.megatron import offload
from mcore_rl.megatron.offload import Offloadable, distinct_storages


def test_views_of_one_storage_move_once_and_see_it_again():
    buffer = torch.randn(300)
    weight = torch.nn.Parameter(buffer[10:110].view(10, 10))
    other = torch.randn(7).to(torch.bfloat16)
    master = weight.detach().view(-1)[3:50]
    expected = buffer.clone(), other.clone()
    moved = Offloadable("x", lambda: [weight, buffer, other, master, torch.empty(0)])
    moved.offload()
    assert moved.is_away
    assert [t.untyped_storage().nbytes() for t in (buffer, weight, other, master)] == [0] * 4
    moved.restore()
    assert not moved.is_away
    assert torch.equal(buffer, expected[0])
    assert torch.equal(other, expected[1])
    assert torch.equal(weight.detach().view(-1), expected[0][10:110])
    assert torch.equal(master, expected[0][13:60])
    with torch.no_grad():
        weight.add_(1.0)
    assert torch.equal(buffer[10:110], expected[0][10:110] + 1.0), "still one storage"


@pytest.mark.parametrize("chunk_bytes", [1, 16, 28, 64, 4096])
def test_storages_lie_across_chunks_of_host_memory(monkeypatch, chunk_bytes):
    monkeypatch.setattr(offload, "CHUNK_BYTES", chunk_bytes)
    tensors = [torch.randn(size) for size in (1, 16, 5, 30, 4)]
    expected = [tensor.clone() for tensor in tensors]
    moved = Offloadable("x", lambda: tensors)
    for _ in range(2):
        moved.offload()
        moved.restore()
    assert all(map(torch.equal, tensors, expected))


def test_what_there_is_to_move_is_asked_each_time():
    tensors = [torch.ones(4)]
    moved = Offloadable("x", lambda: tensors)
    moved.offload()
    moved.restore()
    tensors.append(torch.ones(6))
    moved.offload()
    assert tensors[1].untyped_storage().nbytes() == 0
    moved.restore()
    assert torch.equal(tensors[1], torch.ones(6))


def test_nothing_to_move_moves_and_is_away_all_the_same():
    moved = Offloadable("x", list)
    moved.offload()
    with pytest.raises(OffloadError, match="reader needs x"):
        moved.check_is_here("reader")
    moved.restore()
    moved.check_is_here("reader")


def test_moving_twice_is_an_error():
    moved = Offloadable("actor.grad", lambda: [torch.ones(3)])
    with pytest.raises(OffloadError, match=r"^actor\.grad is on its device: there is nothing"):
        moved.restore()
    moved.offload()
    with pytest.raises(OffloadError, match=r"^offload needs actor\.grad, which is in host memory"):
        moved.offload()


def test_a_storage_that_is_a_numpy_array_too_is_refused_before_anything_moves():
    tensors = [torch.ones(3), torch.ones(5)]
    array = tensors[1].numpy()
    moved = Offloadable("actor.param", lambda: tensors)
    with pytest.raises(OffloadError) as caught:
        moved.offload()
    assert str(caught.value) == (
        "actor.param cannot be offloaded: 20 bytes of it are also a numpy array"
    )
    assert not moved.is_away
    assert array.sum() == 5
    assert torch.equal(tensors[0], torch.ones(3))


def test_what_is_read_later_is_checked_when_it_is_read():
    tensors = {"a": torch.ones(3)}
    moved = Offloadable("actor.param", tensors.values)
    guarded = moved.while_here("the export of weights", tensors)
    assert torch.equal(guarded["a"], torch.ones(3))
    moved.offload()
    assert list(guarded) == ["a"]
    assert "a" in guarded
    assert len(guarded) == 1
    with pytest.raises(OffloadError, match=r"the export of weights needs actor\.param"):
        guarded["a"]
    with pytest.raises(OffloadError):
        list(guarded.items())
    moved.restore()
    assert torch.equal(guarded["a"], torch.ones(3))


def test_storages_are_told_apart_by_what_is_in_them():
    one, other = torch.ones(4), torch.ones(4)
    assert len(distinct_storages([one, one[1:], one.view(2, 2), other, torch.empty(0)])) == 2
