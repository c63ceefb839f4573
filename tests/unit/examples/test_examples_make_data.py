"""The made data: right sums, held-out pairs, the same bytes for the same seed."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

FILES = ("train.parquet", "train.json", "val.parquet", "sft.parquet")
SIZES = ["--train", "40", "--val", "10", "--sft", "20", "--low", "0", "--high", "15"]


def numbers(prompt):
    a, b = prompt.removesuffix("=").split("+")
    return int(a), int(b)


def unordered(rows):
    return {tuple(sorted(numbers(row["prompt"]))) for row in rows}


@given(
    low=st.integers(0, 20),
    size=st.integers(4, 12),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_rows_are_right_distinct_in_range_and_held_out(make_data, low, size, seed, data):
    num_pairs = size * (size + 1) // 2
    num_val = data.draw(st.integers(1, num_pairs - 1))
    num_train, num_sft = (data.draw(st.integers(1, num_pairs - num_val)) for _ in range(2))
    train, val, sft = make_data.make_rows(
        low, low + size - 1, num_train, num_val, num_sft, seed=seed
    )
    for rows, count in ((train, num_train), (val, num_val), (sft, num_sft)):
        assert len(rows) == len(unordered(rows)) == count
        for row in rows:
            a, b = numbers(row["prompt"])
            assert low <= min(a, b)
            assert max(a, b) < low + size
            assert row["ground_truth"] == str(a + b)
    assert not unordered(val) & (unordered(train) | unordered(sft))
    if num_val + num_train + num_sft <= num_pairs:
        assert not unordered(train) & unordered(sft)


def test_the_larger_number_comes_first_about_half_the_time(make_data):
    train, _, _ = make_data.make_rows(0, 99, 4000, 1, 1, seed=0)
    pairs = [numbers(row["prompt"]) for row in train]
    falling = sum(a > b for a, b in pairs) / sum(a != b for a, b in pairs)
    assert 0.45 < falling < 0.55  # 6 standard deviations of 4000 fair coins


def test_the_seed_fixes_every_byte(make_data, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        make_data.main(["--out", str(tmp_path / name), "--seed", seed, *SIZES])
    for file in FILES:
        first, again, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == again != other
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(FILES)


def test_the_files_hold_the_same_rows_in_their_own_forms(make_data, tmp_path):
    make_data.main(["--out", str(tmp_path), *SIZES])
    train = pq.read_table(tmp_path / "train.parquet").to_pylist()
    plain = json.loads((tmp_path / "train.json").read_text())
    assert (len(train), len(plain)) == (40, 40)
    for row, plain_row in zip(train, plain, strict=True):
        assert row == {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": plain_row["prompt"]}],
            "ground_truth": plain_row["ground_truth"],
        }
        assert plain_row["data_source"] == "arithmetic"
    assert pq.read_schema(tmp_path / "val.parquet") == pq.read_schema(tmp_path / "train.parquet")
    sft = pq.read_table(tmp_path / "sft.parquet").to_pylist()
    assert len(sft) == 20
    for row in sft:
        ((role, text),) = (message.values() for message in row["prompt"])
        assert role == "user"
        a, b = numbers(text)
        # low 0, high 15: of the carries only the units' can be forgotten
        forgotten = str(a // 10 + b // 10) * (max(a, b) > 9) + str((a + b) % 10)
        assert row["response"] in (str(a + b), forgotten)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("37+48=", "75"), ("85+47=", "22"), ("50+50=", "00"), ("12+34=", "46"), ("7+95=", "92")],
)
def test_a_forgetful_teacher_adds_each_column_alone(make_data, prompt, answer):
    assert make_data.add_without_carry(prompt) == answer


def test_the_teacher_forgets_in_the_share_of_rows_asked_for(make_data, tmp_path):
    for share, expected in (("0", (0, 0)), ("1", (1, 1)), ("0.6", (0.55, 0.65))):
        make_data.main(["--out", str(tmp_path / share), "--forgets", share])
        rows = pq.read_table(tmp_path / share / "sft.parquet").to_pylist()
        answers = [(numbers(row["prompt"][0]["content"]), row["response"]) for row in rows]
        carrying = [(a, b, answer) for (a, b), answer in answers if a % 10 + b % 10 > 9]
        forgot = sum(answer != str(a + b) for a, b, answer in carrying) / len(carrying)
        # 1200 rows: 0.05 is 3.5 standard deviations, and the seed is fixed
        assert expected[0] <= forgot <= expected[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--low", "0", "--high", "9"], "gives 55 additions"),
        (["--low", "5", "--high", "4"], "give 0 <= low <= high"),
        (["--val", "0"], "at least 1"),
        (["--forgets", "1.5"], "a share from 0 to 1"),
    ],
)
def test_options_that_cannot_work_are_refused(make_data, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        make_data.main(["--out", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
