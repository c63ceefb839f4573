"""Data files to rows: Parquet, a JSON array or JSON lines, told apart by content.

Rows come in the order of the files and keep their place (file, index from 0), so that every fault
of the data is one UserError that names file, row and column. What the columns mean is not decided
here (`data/prompts.py` does).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl.errors import UserError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file."""

    path: Path
    index: int
    """Position in the file, from 0."""
    columns: Mapping[str, Any]

    @property
    def uid(self) -> str:
        """Name of the row in messages and logs: "train.parquet:17"."""
        return f"{self.path.name}:{self.index}"

    def error(self, column: str, problem: str, fix: str = "") -> UserError:
        """Return the error `file row 17, column 'prompt': problem. fix`."""
        text = f"{self.path} row {self.index}, column {column!r}: {problem}."
        return UserError(f"{text} {fix}" if fix else text)

    def get(self, column: str) -> Any:
        """Return the value, or None where the column is absent, null or NaN."""
        value = self.columns.get(column)
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

    def check_text(self, column: str, value: object, fix: str = "") -> str:
        """Return `value`, a part of `column`, if it is a non-blank string."""
        if not isinstance(value, str):
            raise self.error(column, f"{_type_name(value)} where a string is expected", fix)
        if not value.strip():
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
        return value or {}


def read_rows(files: str | Sequence[str]) -> list[Row]:
    """Return all rows of one file or of several, in order.

    Raises:
        UserError: for a file that is missing, empty, of another format or damaged.
    """
    paths = [files] if isinstance(files, str) else list(files)
    return [row for path in paths for row in _read_file(Path(path).expanduser())]


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file. Check the path.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    start = content.lstrip()[:4]
    if start == b"PAR1":
        columns = _read_parquet(path)
    elif start[:1] == b"[":
        columns = _read_json_array(path, content)
    elif start[:1] == b"{":
        columns = _read_json_lines(path, content)
    elif start:
        raise UserError(f"{path}: is neither Parquet nor a JSON array nor JSON lines.")
    else:
        columns = []
    if not columns:
        raise UserError(f"{path}: holds no rows. Leave it out or write it again.")
    return [Row(path, index, row) for index, row in enumerate(columns)]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = _one_line(error)
        raise UserError(f"{path}: is damaged Parquet ({reason}). Write it again.") from None
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        raise _find_bad_text(path, table) from None


def _find_bad_text(path: Path, table) -> UserError:
    for name in table.column_names:
        for index, value in enumerate(table[name]):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                return Row(path, index, {}).error(name, f"the text is not valid UTF-8 ({error})")
    raise AssertionError(f"{path}: no cell fails to decode, yet the table does")


def _read_json_array(path: Path, content: bytes) -> list[dict[str, Any]]:
    rows = _parse_json(content, f"{path}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {index}: is {_type_name(row)}, not a JSON object.")
    return rows


def _read_json_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(line, f"{path} line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: is {_type_name(row)}, not a JSON object.")
        rows.append(row)
    return rows


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not valid UTF-8 ({error}). Save it as UTF-8.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: is not valid JSON ({_one_line(error)}).") from None


def _type_name(value: object) -> str:
    return f"a value of type {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
