import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_rl.data.rows import read_rows
from mcore_rl.errors import UserError

ROWS = [{"prompt": "1+1=", "ground_truth": "2"}, {"prompt": "1+2=", "ground_truth": "3"}]


def _write(path, rows, form):
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "array":
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.mark.parametrize("form", ["parquet", "array", "lines"])
def test_every_format_gives_the_same_rows_whatever_the_file_is_called(tmp_path, form):
    path = tmp_path / "train.data"
    _write(path, ROWS, form)
    rows = list(read_rows(str(path)))
    assert [dict(row.columns) for row in rows] == ROWS
    assert [row.uid for row in rows] == ["train.data:0", "train.data:1"]


def test_several_files_of_any_forms_are_read_in_the_order_given(tmp_path):
    for name, row, form in zip(("b", "a"), ROWS, ("parquet", "lines"), strict=True):
        _write(tmp_path / name, [row], form)
    rows = list(read_rows([str(tmp_path / "b"), str(tmp_path / "a")]))
    assert [row.uid for row in rows] == ["b:0", "a:0"]


def test_rows_of_several_files_of_one_name_are_told_apart_wherever_these_lie(tmp_path):
    """Seeds are drawn from uids, and are to be the same on a machine with other folders."""
    files = [tmp_path / name for name in ("gsm8k/train", "test", "math/train", "gsm8k/train")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        _write(file, ROWS, "lines")
    uids = [row.uid for row in read_rows([str(file) for file in files])]
    assert uids == [
        *("train#1:0", "train#1:1"),
        *("test:0", "test:1"),
        *("train#2:0", "train#2:1"),
        *("train#3:0", "train#3:1"),
    ]


@pytest.mark.parametrize("form", ["parquet", "array", "lines"])
def test_a_large_file_keeps_its_order_and_its_indices(tmp_path, form):
    _write(tmp_path / "train.data", [{"number": n} for n in range(2500)], form)
    rows = list(read_rows(str(tmp_path / "train.data")))
    assert [row.columns["number"] for row in rows] == [row.index for row in rows]
    assert len(rows) == 2500


def test_a_bad_cell_of_a_large_table_is_named_by_its_row_in_the_file(tmp_path):
    cells = [b"fine"] * 1500 + [b"\xff"]
    text = pa.array(cells, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "train.data")
    with pytest.raises(UserError, match=r"row 1500, column 'prompt': .*UTF-8"):
        list(read_rows(str(tmp_path / "train.data")))


@pytest.mark.parametrize("form", ["parquet", "lines"])
def test_what_is_wrong_further_on_is_found_when_it_is_read(tmp_path, form):
    path = tmp_path / "train.data"
    _write(path, [{"text": "x" * 1000 + str(n)} for n in range(5000)], form)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = b"\xff" * 50
    path.write_bytes(content)
    rows = read_rows(str(path))
    assert next(rows).index == 0
    with pytest.raises(UserError, match=r"train\.data"):
        list(rows)


def _damaged_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])


def _parquet_with_bad_text(path):
    text = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"uid": ["0", "1"], "prompt": text}), path)


def _parquet_with_two_columns_of_one_name(path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, path)


def _parquet_with_a_date_that_python_has_not(path):
    dates = pa.array([0, 2**60], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a", "b"], "when": dates}), path)


MALFORMED = {
    "missing": (lambda path: None, "no such file"),
    "an empty folder": (lambda path: path.mkdir(), "no Parquet or JSON file of the split 'train'"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"[]")), r"compressed \(gzip\). Unpack"),
    "byte-order mark": (lambda path: path.write_text("[]", "utf-8-sig"), "a byte-order mark. Save"),
    "utf-16": (lambda path: path.write_text("[]", "utf-16"), "is UTF-16. Save it as UTF-8"),
    "one column twice": (_parquet_with_two_columns_of_one_name, "column 'prompt' twice. Rename"),
    "no date": (_parquet_with_a_date_that_python_has_not, "row 1, column 'when': cannot be read"),
    "one key twice": (
        lambda path: path.write_text('{"a": 1}\n{"b": 1, "a": 1, "a": 2}'),
        r"line 2: .*\(an object has the key 'a' twice\)",
    ),
    "a number of many digits": (lambda path: path.write_text('{"a": 1' + "0" * 5000 + "}"), "JSON"),
    "nested too deep": (lambda path: path.write_text("[" * 10**5), "not valid JSON"),
    "object over several lines": (lambda path: path.write_text('{\n"a": 1}'), "object per line"),
    "empty": (lambda path: path.write_bytes(b" \n"), "holds no rows"),
    "empty array": (lambda path: path.write_text("[]"), "holds no rows"),
    "parquet without rows": (lambda path: pq.write_table(pa.table({"a": []}), path), "no rows"),
    "no known format": (lambda path: path.write_text("prompt,answer\n"), "neither Parquet nor"),
    "cut parquet": (_damaged_parquet, "damaged Parquet"),
    "parquet with bad text": (_parquet_with_bad_text, "row 1, column 'prompt': .*UTF-8"),
    "bad json in line 2": (lambda path: path.write_text('{"a": 1}\n{"a": \n'), "line 2: .*JSON"),
    "line 2 no object": (lambda path: path.write_text('{"a": 1}\n[1]\n'), "line 2: .*list"),
    "bad utf-8": (lambda path: path.write_bytes(b'{"a": 1}\n{"a": "\xff"}'), "line 2: .*UTF-8"),
    "bad json array": (lambda path: path.write_text('[{"a": 1},'), "not valid JSON"),
    "array of numbers": (lambda path: path.write_text('[{"a": 1}, 2]'), "row 1: .*int"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_one_line_that_names_it(tmp_path, name):
    make, problem = MALFORMED[name]
    path = tmp_path / "train.file"
    make(path)
    with pytest.raises(UserError, match=rf"train\.file.*{problem}") as caught:
        list(read_rows(str(path)))
    assert "\n" not in str(caught.value)
