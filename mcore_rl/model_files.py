"""Names of the files of a Hugging Face model folder that are neither weights nor code.

One list says which of them hold a vocabulary; what goes with a copy of the model is built on it, so
a tokenizer that a run accepts is also in what the run writes.
"""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.json"

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
"""Of a tokenizer that transformers can load."""

TIKTOKEN_FILES = ("tiktoken.model", "qwen.tiktoken")
"""Vocabularies (Moonlight, Qwen) that only code beside the weights reads as the model needs it.

Of the first transformers by itself makes a tokenizer that splits text by another pattern, of the
second one of a single token.
"""

_COPIED = (
    CONFIG_FILE,
    "generation_config.json",
    *VOCABULARY_FILES,
    *TIKTOKEN_FILES,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether the folder holds the vocabulary of a tokenizer that transformers can load."""
    return holds_any(folder, VOCABULARY_FILES)


def holds_any(folder: str | Path, names: tuple[str, ...]) -> bool:
    """Return whether one of these files is in the folder."""
    return any((Path(folder) / name).is_file() for name in names)


def model_files(folder: str | Path) -> list[Path]:
    """Return the configuration and tokenizer files of a model folder, sorted."""
    found = {file for pattern in _COPIED for file in Path(folder).glob(pattern)}
    return sorted(file for file in found if file.is_file())
