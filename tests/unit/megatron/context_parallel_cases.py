"""What the processes do in test_megatron_context_parallel.py: one rank's part."""

import torch.distributed as dist

from mcore_rl.data.batch import pack, unpack
from mcore_rl.megatron import cpu
from mcore_rl.megatron.context_parallel import cut_batch, gather_positions, local_positions
from mcore_rl.types import MicroBatch


def row(sequences, size):
    return pack(MicroBatch.of(sequences), pad_token_id=0, device="cpu", align_sequence=2 * size)


def sequence_quantities(sequences, values_T, factors_S):
    """Return the means of the sequences and the gradient of a loss of them at this rank's
    positions; every rank's loss is its share of the whole loss."""
    group = dist.group.WORLD
    assert group is not None
    batch = row(sequences, group.size())
    boundaries = tuple(batch.cu_seqlens_padded.tolist())
    index = local_positions(boundaries, group.rank(), group.size())
    cut = cut_batch(batch, group)
    values_L = values_T[index].clone().requires_grad_()
    mean_S = cut.segments.mean(values_L)
    # As in a loss: a function of the sequence's mean on each of its tokens that this rank holds.
    loss_L = cut.segments.expand(factors_S * mean_S.exp())
    loss_L.sum().backward()
    return mean_S.detach(), index, values_L.grad


def row_cut_and_gathered(sequences):
    """Return what `unpack` gives of the advantages after cutting and gathering them."""
    cpu.install()
    group = dist.group.WORLD
    assert group is not None
    batch = row(sequences, group.size())
    cut = cut_batch(batch, group)
    assert cut.advantages_T is not None
    whole_T = gather_positions(cut.advantages_T, batch.cu_seqlens_padded.tolist(), group)
    return unpack(whole_T, batch), len(cut.labels_T), len(batch.labels_T)
