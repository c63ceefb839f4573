"""Make the quickstart's data: additions like "37+48=" and their sums.

    python examples/quickstart/make_data.py --out outputs/quickstart/data

Writes four files, the same bytes for the same arguments:

    train.parquet  prompts to learn from: data_source, prompt (chat messages), ground_truth
    train.json     the same rows as a JSON array, with the prompt as plain text
    val.parquet    held-out prompts, in the form of train.parquet
    sft.parquet    prompt and response, for a supervised warm-up before reinforcement learning

The warm-up's answers come from a teacher who adds column by column and often forgets every carry:
37+48=75. A model that imitates it well is mediocre at adding, and what it lacks can be learned
from the reward alone, since it carries sometimes. `--forgets 0` gives a teacher without fault.

Two numbers that are added in val.parquet are not added in any other file, in either order. Within
a file no two numbers are added twice. train and sft share additions only where --low to --high has
too few for both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]


def make_rows(
    low: int, high: int, num_train: int, num_val: int, num_sft: int, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows of train, val and sft: {"prompt": "37+48=", "ground_truth": "85"}."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(low, high + 1) for b in range(a, high + 1)]
    rng.shuffle(pairs)
    rows = []
    for pair in pairs:
        a, b = rng.sample(pair, 2)
        rows.append({"prompt": f"{a}+{b}=", "ground_truth": str(a + b)})
    val, rest = rows[:num_val], rows[num_val:]
    return rest[:num_train], val, rest[len(rest) - num_sft :]


def to_prompt_row(row: Row) -> Row:
    """Return a row of train.parquet: the prompt as chat messages."""
    return {
        "data_source": "arithmetic",
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "ground_truth": row["ground_truth"],
    }


def to_json_row(row: Row) -> Row:
    """Return a row of train.json: the prompt as plain text."""
    return {**row, "data_source": "arithmetic"}


def to_sft_row(row: Row, forgets: bool) -> Row:
    """Return a row of sft.parquet: the teacher's answer, with or without the carries."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "response": add_without_carry(row["prompt"]) if forgets else row["ground_truth"],
    }


def add_without_carry(prompt: str) -> str:
    """Return the sum of each column, its last digit only: "37+48=" gives "75"."""
    a, b = prompt.removesuffix("=").split("+")
    width = max(len(a), len(b))
    columns = zip(a.zfill(width), b.zfill(width), strict=True)
    return "".join(str((int(x) + int(y)) % 10) for x, y in columns)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Lend another name to write under, so that a file called `path` is always whole."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def write_parquet(path: Path, rows: list[Row]) -> None:
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial)


def write_json(path: Path, rows: list[Row]) -> None:
    with whole_file(path) as partial:
        partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--low", type=int, default=10, help="smallest number added (10)")
    parser.add_argument("--high", type=int, default=99, help="largest number added (99)")
    parser.add_argument("--train", type=int, default=1024, help="rows of train (1024)")
    parser.add_argument("--val", type=int, default=256, help="rows of val (256)")
    parser.add_argument("--sft", type=int, default=2815, help="rows of sft (2815)")
    parser.add_argument(
        "--forgets", type=float, default=0.6, help="share of sft without carries (0.6)"
    )
    args = parser.parse_args(argv)
    size = args.high - args.low + 1
    num_pairs = size * (size + 1) // 2
    if args.low < 0 or size < 1:
        parser.error(f"--low {args.low} --high {args.high}: give 0 <= low <= high")
    if not 0 <= args.forgets <= 1:
        parser.error(f"--forgets {args.forgets}: give a share from 0 to 1")
    if min(args.train, args.val, args.sft) < 1:
        parser.error("--train, --val and --sft are at least 1")
    if args.val + max(args.train, args.sft) > num_pairs:
        parser.error(
            f"--low {args.low} --high {args.high} gives {num_pairs} additions, fewer than "
            f"--val plus the larger of --train and --sft. Raise --high or lower those."
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    train, val, sft = make_rows(args.low, args.high, args.train, args.val, args.sft, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_parquet(args.out / "train.parquet", [to_prompt_row(row) for row in train])
    write_json(args.out / "train.json", [to_json_row(row) for row in train])
    write_parquet(args.out / "val.parquet", [to_prompt_row(row) for row in val])
    rng = random.Random(f"{args.seed}:forgets")
    sft_rows = [to_sft_row(row, rng.random() < args.forgets) for row in sft]
    write_parquet(args.out / "sft.parquet", sft_rows)
    print(f"{args.out}: {len(train)} train, {len(val)} val and {len(sft)} sft rows")


if __name__ == "__main__":
    main()
