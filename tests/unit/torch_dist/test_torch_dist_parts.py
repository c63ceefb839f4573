"""Bytes that go from file to file arrive in their order, and a file that ends early is noticed."""

import errno
import os

import pytest
import torch

from mcore_rl.errors import UserError
from mcore_rl.torch_dist.parts import FileSpan, append


@pytest.fixture
def span(tmp_path):
    """A span of 3,000 bytes in a file of 5,000."""
    file = tmp_path / "source"
    file.write_bytes(bytes(range(250)) * 20)
    with file.open("rb") as stream:
        yield FileSpan(file, stream.fileno(), 500, 3000)


def refuse(*args):
    raise OSError(errno.EINVAL, "not here")


@pytest.mark.parametrize("send", [os.sendfile, refuse])
def test_spans_and_tensors_are_appended_in_their_order(span, tmp_path, monkeypatch, send):
    """Also where the file system cannot send."""
    monkeypatch.setattr(os, "sendfile", send)
    numbers = torch.arange(6, dtype=torch.int16)
    with (tmp_path / "out").open("wb") as stream:
        stream.write(b"head")
        assert append(stream, span.part(3, 700)) == 700
        assert append(stream, numbers[::2]) == 6
        assert append(stream, span.part(0, 2)) == 2
        assert stream.tell() == 4 + 700 + 6 + 2
        stream.write(b"tail")
    source = span.file.read_bytes()
    expected = b"head" + source[503:1203] + bytes([0, 0, 2, 0, 4, 0]) + source[500:502] + b"tail"
    assert (tmp_path / "out").read_bytes() == expected


def test_a_file_cut_short_meanwhile_is_one_clear_error(span, tmp_path):
    with span.file.open("r+b") as file:
        file.truncate(2000)
    with (tmp_path / "out").open("wb") as stream, pytest.raises(UserError, match="was cut short"):
        append(stream, span)
    with pytest.raises(UserError, match="was cut short"):
        span.read(memoryview(bytearray(span.nbytes)))
