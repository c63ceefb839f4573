"""Sequences out of the micro-batches that hold them, for tests of who gets which."""

from mcore_rl.types import NUMBERS, MicroBatch, TokenSequence


def sequences_of(micro_batch: MicroBatch) -> list[TokenSequence]:
    """Return the sequences that lie end to end in a micro-batch."""
    parts = [micro_batch.cut(i, i + 1) for i in range(len(micro_batch.lengths))]
    names = ("token_ids", "loss_mask", *NUMBERS, "routed_experts")
    return [TokenSequence(**{name: getattr(part, name) for name in names}) for part in parts]
