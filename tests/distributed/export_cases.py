"""What the processes are asked to do in the tests of loading and exporting."""

from __future__ import annotations

import contextlib

from mcore_rl.errors import CheckpointError, UserError
from mcore_rl.megatron import parallel
from mcore_rl.megatron.model import load_weights
from mcore_rl.models import safetensors_io
from mcore_rl.models.safetensors_io import CheckpointReader
from tests.actor_cases import running_worker
from tests.file_limit import files_no_longer_than


class CountingReader(CheckpointReader):
    """Counts the bytes that it is asked for, by tensor."""

    def __init__(self, folder):
        super().__init__(folder)
        self.num_bytes = {}

    def read(self, name, rows=None, cols=None):
        part = super().read(name, rows, cols)
        self.num_bytes[name] = self.num_bytes.get(name, 0) + part.nbytes
        return part


def bytes_read(spec):
    """Return how many bytes of each tensor this rank reads to fill its parameters."""
    with running_worker(spec) as worker:
        actor, reader = worker.actor, CountingReader(spec.model_path)
        load_weights(actor.params, actor.entries, reader, worker.parallel)
        return reader.num_bytes


def refusal(spec):
    """Return why the weights are refused, None if they are not."""
    try:
        with running_worker(spec):
            return None
    except UserError as error:
        parallel.shut_down()  # what no worker was left to do
        return str(error)


@contextlib.contextmanager
def files_written():
    """Yield a list that grows by the name of each file of weights that this process writes."""
    names, write_file = [], safetensors_io._write_file

    def write_and_note(file, tensors):
        names.append(file.name.removesuffix(".tmp"))
        write_file(file, tensors)

    safetensors_io._write_file = write_and_note
    try:
        yield names
    finally:
        safetensors_io._write_file = write_file


def export(spec, folder, max_shard_bytes):
    """Export to `folder`; return the names of the files that this rank wrote."""
    with running_worker(spec) as worker, files_written() as names:
        worker.actor.export_hf(folder, max_shard_bytes)
        return names


def failure_to_export(spec, folder, num_bytes):
    """Return why an export fails if no file may be longer than `num_bytes`."""
    with running_worker(spec) as worker:
        try:
            with files_no_longer_than(num_bytes):
                worker.actor.export_hf(folder)
        except CheckpointError as error:
            return str(error)
