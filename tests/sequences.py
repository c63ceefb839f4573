"""What micro-batches and sequences hold, in forms that compare with ==."""

from dataclasses import asdict

from mcore_rl.types import NUMBERS, MicroBatch, TokenSequence


def sequences_of(micro_batch: MicroBatch) -> list[TokenSequence]:
    """Return the sequences that lie end to end in a micro-batch."""
    parts = [micro_batch.cut(i, i + 1) for i in range(len(micro_batch.lengths))]
    names = ("token_ids", "loss_mask", *NUMBERS, "routed_experts")
    return [TokenSequence(**{name: getattr(part, name) for name in names}) for part in parts]


def lists_of(sequence: TokenSequence) -> dict[str, list]:
    """Return what a sequence carries, as lists."""
    return {name: x.tolist() for name, x in asdict(sequence).items() if x is not None}
