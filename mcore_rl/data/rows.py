"""Data files to rows: Parquet, a JSON array or JSON lines, told apart by content.

Rows come one after another in the order of the files and keep their place (file, index from 0), so
that every fault of the data is one UserError that names file, row and column. What the columns mean
is not decided here (`data/prompts.py` does).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mcore_rl.data.sources import find_files
from mcore_rl.errors import UserError
from mcore_rl.foreign_json import parse_json

_PARQUET_ROWS = 1024
"""Read at a time."""

_UNPACK, _SAVE = "Unpack it.", "Save it as UTF-8 without a byte-order mark."
_FOREIGN_FILES = {
    b"\x1f\x8b": ("is compressed (gzip)", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("is compressed (zstd)", _UNPACK),
    b"BZh": ("is compressed (bzip2)", _UNPACK),
    b"\xfd7zXZ": ("is compressed (xz)", _UNPACK),
    b"PK\x03\x04": ("is compressed (zip)", _UNPACK),
    b"\xef\xbb\xbf": ("begins with a byte-order mark", _SAVE),
    b"\xff\xfe": ("is UTF-16", _SAVE),
    b"\xfe\xff": ("is UTF-16", _SAVE),
}
"""What is wrong with a file that begins so, and the fix."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file."""

    path: Path
    index: int
    """Position in the file, from 0."""
    columns: Mapping[str, Any]
    file_number: int | None = None
    """From 1, among the files of this name that are read together; None if it is the only one."""

    @property
    def uid(self) -> str:
        """Name of the row in messages, logs and seeds: "train.parquet:17", "train.parquet#2:17".

        It does not depend on the folder, so that a run gives the same numbers on any machine.
        """
        number = "" if self.file_number is None else f"#{self.file_number}"
        return f"{self.path.name}{number}:{self.index}"

    def error(self, column: str, problem: str, fix: str = "") -> UserError:
        """Return the error `file row 17, column 'prompt': problem. fix`."""
        text = f"{self.path} row {self.index}, column {column!r}: {problem}."
        return UserError(f"{text} {fix}" if fix else text)

    def get(self, column: str) -> Any:
        """Return the value, or None where the column is absent, null or NaN."""
        value = self.columns.get(column)
        return None if isinstance(value, float) and math.isnan(value) else value

    def at(self, path: str) -> Any:
        """Return the value of a column or, below objects, of a path such as "extra_info.answer";
        None as `get`."""
        if path in self.columns or "." not in path:
            return self.get(path)
        column, *names = path.split(".")
        value = self.get(column)
        for name in names:
            is_object = isinstance(value, Mapping)
            value = cast("Mapping[str, Any]", value).get(name) if is_object else None
        return None if isinstance(value, float) and math.isnan(value) else value

    def text(self, column: str, fix: str = "") -> str:
        """Return a value that must be a non-blank string.

        Raises:
            UserError: if it is missing, of another type, blank, or not encodable as UTF-8.
        """
        value = self.get(column)
        if value is None:
            raise self.error(column, f"there is no value; columns are {list(self.columns)}", fix)
        return self.check_text(column, value, fix)

    def check_text(
        self, column: str, value: object, fix: str = "", *, may_be_empty: bool = False
    ) -> str:
        """Return `value`, a part of `column`, if it is a string, not blank unless it may be."""
        if not isinstance(value, str):
            raise self.error(column, f"{_type_name(value)} where a string is expected", fix)
        if not may_be_empty and not value.strip():
            raise self.error(column, "the text is empty", fix)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(column, f"the text is not valid UTF-8 ({error})", fix) from None
        return value

    def mapping(self, column: str) -> Mapping[str, Any]:
        """Return a value that must be an object (a struct in Parquet); empty if missing."""
        value = self.get(column)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(column, f"{_type_name(value)} where an object is expected")
        return cast("Mapping[str, Any]", value or {})


def read_rows(names: str | Sequence[str]) -> Iterator[Row]:
    """Yield all rows of one file, folder or data set (see `sources.py`) or of several, in order.

    Of Parquet and JSON lines only a part is in memory at a time, of a JSON array the whole.

    Raises:
        UserError: for a file that is missing, empty, of another format or damaged.
    """
    names = [names] if isinstance(names, str) else names
    paths = [path for name in names for path in find_files(name)]
    num_named = Counter(path.name for path in paths)
    num_read: Counter[str] = Counter()
    for path in paths:
        num_read[path.name] += 1
        file_number = num_read[path.name] if num_named[path.name] > 1 else None
        yield from _read_file(path, file_number)


def _read_file(path: Path, file_number: int | None) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16).lstrip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    for start, (problem, fix) in _FOREIGN_FILES.items():
        if head.startswith(start):
            raise UserError(f"{path}: {problem}. {fix}")
    if head.startswith(b"PAR1"):
        rows = _read_parquet(path)
    elif head.startswith(b"["):
        rows = _read_json_array(path)
    elif head.startswith(b"{"):
        rows = _read_json_lines(path)
    elif head:
        raise UserError(
            f"{path}: is neither Parquet nor a JSON array nor JSON lines. Write it as one of these."
        )
    else:
        rows = iter(())
    index = -1
    for index, columns in enumerate(rows):
        yield Row(path, index, columns, file_number)
    if index < 0:
        raise UserError(f"{path}: holds no rows. Leave it out or write it again.")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    arrow_error = cast("type[Exception]", pa.ArrowException)  # pyright: ignore[reportUnknownMemberType]
    index = 0
    try:
        file: Any = pq.ParquetFile(path)
        names = file.schema_arrow.names
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path}: has the column {name!r} twice. Rename one of them.")
        for batch in file.iter_batches(_PARQUET_ROWS):
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError, arrow_error):
                raise _find_bad_cell(path, index, batch) from None
            yield from rows
            index += len(rows)
    except (arrow_error, OSError) as error:
        reason = _one_line(error)
        raise UserError(f"{path}: is damaged Parquet ({reason}). Write it again.") from None


def _find_bad_cell(path: Path, first: int, batch: Any) -> UserError:
    for name in batch.schema.names:
        for index, value in enumerate(batch[name], first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                return Row(path, index, {}).error(name, f"the text is not valid UTF-8 ({error})")
            except Exception as error:  # noqa: BLE001  whatever a type of Arrow's raises
                return Row(path, index, {}).error(name, f"cannot be read ({_one_line(error)})")
    raise AssertionError(f"{path}: no cell fails to be read, yet the table does")


def _read_json_array(path: Path) -> Iterator[dict[str, Any]]:
    rows = _parse_json(path.read_bytes(), f"{path}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {index}: is {_type_name(row)}, not a JSON object.")
    rows.reverse()
    while rows:  # so that a row may be freed as soon as it has been used
        yield rows.pop()


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parse_json(line, f"{path} line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: is {_type_name(row)}, not a JSON object.")
            yield row


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return parse_json(content, object_pairs_hook=_with_different_keys)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not valid UTF-8 ({error}). Save it as UTF-8.") from None
    except ValueError as error:
        raise UserError(
            f"{where}: is not valid JSON ({_one_line(error)}). "
            "A file holds one array of objects, or one object per line."
        ) from None


def _with_different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {max(keys, key=keys.count)!r} twice")
    return row


def _type_name(value: object) -> str:
    return f"a value of type {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
