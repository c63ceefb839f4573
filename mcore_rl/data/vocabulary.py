"""Whether a tokenizer and the model beside it have the same vocabulary.

A token that the model has no row for is silently another one, or nothing, with tensor parallelism,
an IndexError without it, and one that no engine loads in an export.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mcore_rl.data.chat import load_tokenizer
from mcore_rl.errors import UserError, require
from mcore_rl.model_files import CONFIG_FILE, has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise a UserError if the tokenizer has ids at or above `vocab_size` of the model."""
    beyond = {number: token for token, number in tokenizer.get_vocab().items()}
    beyond = {number: token for number, token in beyond.items() if number >= vocab_size}
    first = min(beyond, default=0)
    require(
        not beyond,
        f"{CONFIG_FILE}: vocab_size",
        vocab_size,
        f"leaves out {len(beyond)} tokens of the tokenizer, first {beyond.get(first)!r} ({first})",
        "Take the tokenizer of this model, or resize its embeddings (resize_token_embeddings).",
    )


def check_tokenizer(folder: str | Path, vocab_size: int) -> None:
    """Do the same for the tokenizer of a model folder, if it has one that can be loaded: what does
    without a tokenizer, as a conversion, is not stopped by one that only code beside it reads."""
    if not has_tokenizer(folder):
        return
    try:
        tokenizer = load_tokenizer(str(folder))
    except UserError:
        return
    check_vocabulary(tokenizer, vocab_size)
