"""What tells one tensor from another, and what the two forms see."""

from __future__ import annotations

import multiprocessing
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.weight_sync.digest import Manifest, content_of, full_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool]


def random_tensor(shape, dtype=torch.float32, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 99, shape, generator=source).to(dtype)


def manifest_of(*named_tensors):
    manifest = Manifest()
    manifest.add(named_tensors)
    return manifest


def content_by_the_formula(tensor):
    """The sum of the module's docstring, with Python's integers."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    data += bytes(-len(data) % 512)
    words = [int(word) for word in np.frombuffer(data, np.int64)]
    total = 0
    for row in range(len(words) // 64):
        mixed = _signed((row + 1) * -0x61C8864680B583EB)
        mixed = _signed((mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47) | 1
        total += mixed * sum(words[64 * row : 64 * row + 64])
    return _signed(total)


def _signed(number):
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (3, 5), (64, 2), (70, 33), (2, 3, 129)])
def test_the_content_is_the_sum_of_the_docstring(shape, dtype):
    tensor = random_tensor(shape, dtype)
    assert content_of(tensor) == content_by_the_formula(tensor)


def test_strides_and_places_in_a_buffer_do_not_matter():
    tensor = random_tensor((48, 80))
    whole = torch.zeros(1 + tensor.numel())
    shifted = whole[1:].view(48, 80).copy_(tensor)  # not aligned
    turned = tensor.t().contiguous().t()
    columns = torch.cat([tensor, tensor], dim=1)[:, :80]
    for other in (shifted, turned, columns, torch.nn.Parameter(tensor)):
        assert content_of(other) == content_of(tensor)
        assert full_digest(other.detach()) == full_digest(tensor)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(0, 1 << 30), st.integers(0, 7))
def test_every_flipped_bit_is_seen(num_rows, num_columns, place, bit):
    tensor = random_tensor((num_rows, num_columns))
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[place % other.nbytes] ^= 1 << bit
    assert content_of(other) != content_of(tensor)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 299), st.integers(0, 299), st.sampled_from([256, 1024]))
def test_swapped_rows_are_seen(first, second, num_columns):
    tensor = torch.randn(300, num_columns, generator=torch.Generator().manual_seed(1))
    order = list(range(300))
    order[first], order[second] = order[second], order[first]
    assert (content_of(tensor[order]) == content_of(tensor)) == (first == second)


def test_a_transposed_matrix_is_seen():
    matrix = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    assert content_of(matrix.t()) != content_of(matrix)


def test_a_tensor_that_is_written_into_after_its_digest_is_seen():
    """Digests are remembered by tensor, for as long as nothing is written into it."""
    tensor = random_tensor((8, 8))
    before = content_of(tensor)
    assert content_of(tensor) == before
    tensor[3].add_(1)
    assert content_of(tensor) == content_of(tensor.clone()) != before


def test_words_that_change_places_within_a_row_are_seen_by_the_full_form_alone():
    tensor = random_tensor((4, 128))
    other = tensor.roll(2, dims=1)
    assert content_of(other) == content_of(tensor)
    assert full_digest(other) != full_digest(tensor)


def test_two_experts_that_changed_places_are_named():
    first, second = random_tensor((8, 8), seed=1), random_tensor((8, 8), seed=2)
    sent = manifest_of(("experts.0", first), ("experts.1", second))
    arrived = manifest_of(("experts.0", second), ("experts.1", first))
    assert sent.differences(arrived) == [
        "experts.0 arrived with other content",
        "experts.1 arrived with other content",
    ]


def test_a_manifest_does_not_depend_on_buckets_or_their_order_and_travels():
    a, b, c = [(name, random_tensor((9, 9), seed=ord(name))) for name in "abc"]
    sent, arrived = manifest_of(a, b, c), manifest_of(c)
    arrived.add([a])
    arrived.add([])
    assert sent.differences(arrived) == ["b did not arrive"]
    arrived.add([b])
    travelled = pickle.loads(pickle.dumps(sent))
    assert len(travelled) == 3
    assert travelled.differences(arrived) == []
    assert sent.differences(manifest_of(a, b, c, a)) == ["a arrived twice"]
    assert manifest_of(a, a).differences(manifest_of(a, a))[0] == "a was sent twice"


def test_tensors_are_added_beside_other_work_and_not_held_after_it():
    """A slot of shared memory is free again when nobody holds a tensor in it."""
    tensor = random_tensor((300, 300))
    expected, manifest, held = manifest_of(("w", tensor)), Manifest(), weakref.ref(tensor)
    with manifest.adding([("w", tensor)]):
        del tensor
    assert held() is None
    assert expected.differences(manifest) == []


def test_what_goes_wrong_beside_or_inside_is_said():
    with pytest.raises(RuntimeError, match="inside"), Manifest().adding([]):
        raise RuntimeError("inside")
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="memory format"), Manifest().adding([("w", sparse)]):
        pass


def add_one():
    with Manifest().adding([("w", torch.zeros(1))]):
        pass


@pytest.mark.starts_processes
def test_a_fork_of_a_process_that_added_tensors_adds_its_own():
    add_one()
    fork = multiprocessing.get_context("fork").Process(target=add_one)
    fork.start()
    fork.join(60)
    is_done = fork.exitcode == 0
    fork.kill()
    assert is_done


def test_a_manifest_of_many_tensors_is_small():
    tensor = torch.zeros(1)
    names = [f"model.layers.{i // 400}.mlp.experts.{i % 400}.gate.weight" for i in range(20_000)]
    pickled = pickle.dumps(manifest_of(*((name, tensor) for name in names)), protocol=5)
    assert len(pickled) < 100 * len(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_digested_in_full_can_still_be_offloaded(dtype):
    """A storage that was once given out as a numpy array cannot be resized any more."""
    weight = torch.randn(3, 5).to(dtype)
    other = weight.clone()
    other.view(torch.uint8)[2, 1] ^= 1
    assert full_digest(weight) == full_digest(weight.clone())
    assert full_digest(weight) != full_digest(other)
    assert full_digest(weight[1:]) == full_digest(weight[1:].clone())
    assert full_digest(torch.empty(0, 2)).startswith("float32[0, 2]:")
    weight.untyped_storage().resize_(0)
