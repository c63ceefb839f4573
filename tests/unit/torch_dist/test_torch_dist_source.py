"""The bytes of stored tensors are what torch itself writes and reads."""

import io
from typing import Any

import pytest
import torch

from mcore_rl.checkpoint_metadata import METADATA_FILE
from mcore_rl.errors import UserError
from mcore_rl.torch_dist.format import (
    FORMAT_FILE,
    Location,
    Piece,
    format_bytes,
    metadata_bytes,
    write_tensor,
)
from mcore_rl.torch_dist.source import TorchDistSource
from tests.poison import MakesFolder

WHOLE = torch.arange(6 * 8, dtype=torch.float32).view(6, 8)


@pytest.fixture
def stored(tmp_path):
    """Return a function: (offsets, tensor) of each rectangle as torch.save has it -> its source."""

    def source_of(*rectangles, dtype=None):
        located = []
        with (tmp_path / "0.distcp").open("wb") as stream:
            for offsets, tensor in rectangles:
                start = stream.tell()
                torch.save(tensor, stream)
                piece = Piece("key", offsets, tuple(tensor.shape), dtype or tensor.dtype)
                located.append((piece, Location("0.distcp", start, stream.tell() - start)))
        (tmp_path / METADATA_FILE).write_bytes(metadata_bytes({"key": WHOLE.shape}, located, {}))
        (tmp_path / FORMAT_FILE).write_bytes(format_bytes())
        return TorchDistSource(tmp_path)

    return source_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7, 3), (5,), (1, 1, 64, 129)])
def test_torch_loads_a_tensor_written_in_parts(shape, dtype):
    whole = torch.randn(shape).to(dtype)
    rows = whole.reshape(-1, *shape[-1:]) if len(shape) > 1 else whole
    stream = io.BytesIO()
    stream.write(b"before")
    write_tensor(stream, shape, dtype, rows.split([1, len(rows) - 1]))
    loaded = torch.load(io.BytesIO(stream.getvalue()[6:]), weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, whole)


def test_the_bytes_beside_the_numbers_and_checksums_are_those_of_torch():
    whole = torch.randn(3, 5)
    ours, theirs = io.BytesIO(), io.BytesIO()
    write_tensor(ours, (3, 5), torch.float32, [whole])
    torch.save(whole, theirs)
    different = sum(a != b for a, b in zip(ours.getvalue(), theirs.getvalue(), strict=True))
    # Two checksums of four bytes, and a name of 40 digits that torch derives from them.
    assert 0 < different <= 2 * 4 + 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_dtypes_that_are_not_of_weights_are_refused(stored, dtype):
    source = stored(((0, 0), WHOLE.to(dtype)))
    with pytest.raises(UserError, match=rf"dtype of key.*{dtype}.*is not one of torch.float32, "):
        source.dtype("key")


def test_numbers_of_another_dtype_than_the_metadata_says_are_not_copied(stored):
    source = stored(((0, 0), WHOLE), dtype=torch.bfloat16)
    for give in (source.read, source.span):
        with pytest.raises(UserError, match=r"0\.distcp does not hold 'key' at byte 0"):
            give("key", (0, 0), (6, 8))


def test_code_in_a_checkpoint_is_not_run(stored, tmp_path):
    """A pickle that calls something else than a tensor is made of is not followed."""
    source = stored(((0, 0), MakesFolder(tmp_path / "called", shape=(6, 8), dtype=torch.float32)))
    with pytest.raises(UserError, match=r"0\.distcp is refused.* asks for posix\.mkdir, "):
        source.read("key", (0, 0), (6, 8))
    assert not (tmp_path / "called").exists()


def test_too_few_numbers_are_not_written_silently():
    with pytest.raises(AssertionError, match="float32"):
        write_tensor(io.BytesIO(), (2, 2), torch.float32, [torch.zeros(1, 2)])


RECTANGLES = {
    "rows": [((0, 0), WHOLE[:4].clone()), ((4, 0), WHOLE[4:].clone())],
    "rows that share a storage": [((0, 0), WHOLE[:4]), ((4, 0), WHOLE[4:])],
    "columns": [((0, 0), WHOLE[:, :3].clone()), ((0, 3), WHOLE[:, 3:].clone())],
    "transposed": [((0, 0), WHOLE.T.contiguous().T)],
}


@pytest.mark.parametrize("kind", RECTANGLES)
def test_every_rectangle_is_read_however_it_is_stored(stored, kind):
    """A span is given exactly where the numbers lie in one piece, and holds these numbers."""
    source = stored(*RECTANGLES[kind])
    num_spans = 0
    for top, left, height, width in [(0, 0, 6, 8), (1, 0, 2, 8), (5, 0, 1, 8), (2, 1, 3, 4)]:
        expected = WHOLE[top : top + height, left : left + width]
        assert torch.equal(source.read("key", (top, left), (height, width)), expected)
        span = source.span("key", (top, left), (height, width))
        if span is not None:
            num_spans += 1
            found = torch.empty(height, width)
            buffer: Any = found.view(-1).numpy()
            span.read(memoryview(buffer).cast("B"))
            assert torch.equal(found, expected)
    assert num_spans == (2 if kind.startswith("rows") else 0)
    source.close()


@pytest.mark.parametrize("kind", RECTANGLES)
def test_every_rectangle_is_read_into_any_tensor(stored, kind):
    source = stored(*RECTANGLES[kind])
    for top, left, height, width in [(0, 0, 6, 8), (1, 0, 2, 8), (5, 0, 1, 8), (2, 1, 3, 4)]:
        expected = WHOLE[top : top + height, left : left + width]
        for target in (
            torch.full((height, width), -1.0),
            torch.full((width, height), -1.0).T,
            torch.full((height, width), -1.0, dtype=torch.bfloat16),  # which has these exactly
        ):
            source.read_into("key", (top, left), target)
            assert torch.equal(target.float(), expected)
            assert target.untyped_storage().resizable()  # as what is offloaded must be


def test_what_lies_beyond_the_stored_tensor_is_zero(stored):
    target = torch.full((4, 8), -1.0)
    stored(((0, 0), WHOLE)).read_into("key", (4, 0), target)
    assert torch.equal(target, torch.cat([WHOLE[4:], torch.zeros(2, 8)]))


def test_a_hole_between_the_pieces_is_not_filled_in_silence(stored):
    source = stored(((0, 0), WHOLE[:2].clone()), ((3, 0), WHOLE[3:].clone()))
    source.read_into("key", (3, 0), torch.empty(3, 8))
    with pytest.raises(UserError, match="pieces of 'key' are missing"):
        source.read_into("key", (0, 0), torch.empty(6, 8))
