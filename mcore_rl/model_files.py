"""Where the files of a Hugging Face model are, and the names of those that are not code.

A model is named by its folder, or as on the hub: `Qwen/Qwen2.5-7B`, `Qwen/Qwen2.5-7B@revision`. The
hub's are read from its cache on this machine, and downloaded only with HF_HUB_OFFLINE=0.

One list says which files hold a vocabulary. The files for a copy of the model follow from it, so a
tokenizer that a run accepts is also in the model that it writes.
"""

from __future__ import annotations

import os
from pathlib import Path

from mcore_rl.errors import UserError
from mcore_rl.foreign_json import parse_json
from mcore_rl.hub import NotThereError, fetch, is_hub_name, may_download

CONFIG_FILE = "config.json"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
"""Vocabulary files of tokenizers that transformers can load."""

TIKTOKEN_FILES = ("tiktoken.model", "qwen.tiktoken")
"""Vocabularies (Moonlight, Qwen) that only code in the model's folder reads correctly.

From the first, transformers itself makes a tokenizer that splits text by another pattern; from the
second, a tokenizer with a single token.
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
    "additional_chat_templates/*",
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


_WEIGHTS = ("model*.safetensors", INDEX_FILE)


def find_model(
    name: str | Path, key: str = "model.path", *, weights: bool = True, download: bool = False
) -> Path:
    """Return the folder of a model on this machine.

    Args:
        name: the folder, or a name of the hub, with or without `@revision`.
        key: with which the user gave it, for messages.
        weights: False: configuration and tokenizer are enough.
        download: fetch what the cache lacks of a model of the hub, if HF_HUB_OFFLINE=0 allows it.

    Raises:
        UserError: if it has the form of the hub's names, and neither a folder nor the cache (nor
            the hub) has it.
    """
    folder, (repository, _, revision) = Path(name).expanduser(), str(name).partition("@")
    if os.path.isdir(folder) or not is_hub_name(repository):
        return folder
    patterns = [*_COPIED, *(_WEIGHTS if weights else ())]
    try:
        folder = fetch(
            repository, patterns, kind="model", revision=revision or None, download=download
        )
        _check_whole(folder, weights)
    except NotThereError as error:
        raise UserError(
            f"{key}={str(name)!r} is no folder here, and {error.reason}. {error.fix}"
        ) from None
    return folder


def fetch_model(name: str, key: str, *, weights: bool = True) -> str:
    """Return `name`; for a model of the hub, with the present commit. Its files are then in the
    cache, and `find_model` finds exactly these, even if the branch changes."""
    folder = find_model(name, key, weights=weights, download=True)
    repository = name.partition("@")[0]
    return name if folder == Path(name).expanduser() else f"{repository}@{folder.name}"


def published_name(folder: str | Path) -> str:
    """Return the name on the hub of a folder in its cache; of any other folder its path."""
    repository = Path(folder).parent.parent.name
    is_cached = Path(folder).parent.name == "snapshots" and repository.startswith("models--")
    return repository.removeprefix("models--").replace("--", "/", 1) if is_cached else str(folder)


def _check_whole(snapshot: Path, weights: bool) -> None:
    """Raise a NotThereError if the cache holds only a part of what is needed: other programs take
    single files."""
    needed, index = {CONFIG_FILE}, snapshot / INDEX_FILE
    if weights and index.is_file() and not (snapshot / SINGLE_FILE).is_file():
        needed |= set(parse_json(index.read_bytes())["weight_map"].values())
    elif weights:
        needed.add(SINGLE_FILE)
    missing = sorted(name for name in needed if not (snapshot / name).is_file())
    if missing and not may_download():
        raise NotThereError(
            f"the cache of the Hugging Face hub holds only a part of it, without {missing[0]}",
            "Set HF_HUB_OFFLINE=0 to have the rest downloaded.",
        )
    if missing:
        raise NotThereError(
            f"the hub's model has no {missing[0]}",
            "Take one with weights in the safetensors format.",
        )
