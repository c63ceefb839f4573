"""The bytes of stored tensors are what torch itself writes and reads."""

import io

import pytest
import torch

from mcore_rl.convert.torch_dist import write_tensor


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


def test_too_few_numbers_are_not_written_silently():
    with pytest.raises(AssertionError, match="float32"):
        write_tensor(io.BytesIO(), (2, 2), torch.float32, [torch.zeros(1, 2)])
