"""What `data.train_files` names, as files on this machine.

    train.parquet              a file of any form that `rows.py` reads, whatever it is called
    data/gsm8k@test            a folder: its Parquet and JSON files of the split "test"
    openai/gsm8k:main@train    a data set of the Hugging Face hub, in its configuration "main"

`@split` is @train where it is left out, and `:configuration` is needed only where there are
several. A split's files are found by the hub's own names: `test.jsonl`,
`data/test-00000-of-00002.parquet`, `test/0000.parquet`; where no file is named after a split, all
are of the split "train". Data sets of the hub are read from its cache on this machine; they are
downloaded only with HF_HUB_OFFLINE=0, and no code of theirs is ever run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mcore_rl.errors import UserError
from mcore_rl.hub import NotThereError, fetch, is_hub_name

_SUFFIXES = (".parquet", ".json", ".jsonl")
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def find_files(name: str) -> list[Path]:
    """Return the files that `name` stands for, in order.

    Raises:
        UserError: if there are none, or if it is not clear which are meant.
    """
    path = Path(name).expanduser()
    if os.path.isfile(path):  # Path.is_file raises where a name is too long
        return [path]
    source, _, split = name.partition("@")
    source, _, configuration = source.partition(":")
    folder = Path(source).expanduser()
    if not source or not os.path.isdir(folder):
        folder = _cached_data_set(source, name)
    return _files_of_split(folder / configuration, split or "train", name)


def _cached_data_set(source: str, name: str) -> Path:
    """Return the folder of a data set of the hub, downloaded if that is allowed."""
    if Path(source).suffix in _SUFFIXES or not is_hub_name(source):
        raise UserError(f"{name}: there is no such file. Check the path.")
    try:
        return fetch(source, [f"*{suffix}" for suffix in _SUFFIXES], kind="dataset")
    except NotThereError as error:
        raise UserError(f"{name}: there is no such file, and {error.reason}. {error.fix}") from None


def _files_of_split(folder: Path, split: str, name: str) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in _SUFFIXES and not file.name.startswith((".", "dataset_info"))
    ]
    chosen = [file for file in files if _is_of_split(file, split)]
    if split == "train" and not any(_is_of_split(file, s) for file in files for s in _SPLITS):
        chosen = files
    if not chosen:
        raise UserError(
            f"{name}: {folder} holds no Parquet or JSON file of the split {split!r}. "
            "Name a file, or another split after an @."
        )
    places = sorted({str(file.parent.relative_to(folder)) for file in chosen})
    if len(places) > 1:
        raise UserError(
            f"{name}: the split {split!r} is in {', '.join(places)}. "
            "Name one of them after a colon, as in folder:name@split."
        )
    return chosen


def _is_of_split(file: Path, split: str) -> bool:
    """Whether it is named test.jsonl or test-00000-of-00002.parquet, or is in a folder test."""
    return file.parent.name == split or re.split(r"[-_.]", file.stem)[0] == split
