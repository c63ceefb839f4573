"""Write GSM8K as Parquet that `data.train_files` and `data.val_files` take.

    python tools/prepare_gsm8k.py train.jsonl test.jsonl --out data/gsm8k
    python tools/prepare_gsm8k.py train.jsonl --out data/gsm8k --sft

Each input holds rows {"question": ..., "answer": "... #### 72"} (JSON lines, a JSON array or
Parquet) and becomes one file of the same name. By default its rows are prompts with a reference
answer for the reward "gsm8k"; with `--sft`, prompts with the worked answer as response.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mcore_rl.data.rows import Row, read_rows
from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError

INSTRUCTION = 'Reason step by step and end with the answer as a plain number after "####".'


def prompt_row(row: Row) -> dict[str, Any]:
    """Return one row for reinforcement learning: prompt, reference answer, reward name."""
    return {
        "data_source": "gsm8k",
        "prompt": _messages(row),
        "ground_truth": reference_answer(row),
        "extra_info": {"index": row.index, "answer": row.text("answer")},
    }


def sft_row(row: Row) -> dict[str, Any]:
    """Return one row for supervised fine-tuning: prompt and response."""
    return {"prompt": _messages(row), "response": row.text("answer")}


def reference_answer(row: Row) -> str:
    """Return the number after the last "####" of the answer, without thousands separators.

    Raises:
        UserError: if the answer has no such part.
    """
    _, mark, number = row.text("answer").rpartition("####")
    if not mark or not number.strip():
        raise row.error("answer", 'there is no "#### <number>" at its end')
    return number.strip().replace(",", "")


def _messages(row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{row.text('question')}\n{INSTRUCTION}"}]


def prepare(files: list[str], out: Path, limit: int | None, sft: bool) -> list[Path]:
    """Write one Parquet file per input file and return their paths."""
    make_row = sft_row if sft else prompt_row
    suffix = "_sft.parquet" if sft else ".parquet"
    targets = [out / f"{Path(file).stem}{suffix}" for file in files]
    if len(set(targets)) < len(targets):
        raise UserError("Two input files have the same name. Prepare them into two folders.")
    out.mkdir(parents=True, exist_ok=True)
    for file, target in zip(files, targets, strict=True):
        rows = [make_row(row) for row in islice(read_rows(file), limit)]
        pq.write_table(pa.Table.from_pylist(rows), target)
        print(f"{target}: {len(rows)} rows")
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", help="raw GSM8K files with question and answer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--limit", type=int, help="take only the first LIMIT rows of each file")
    parser.add_argument("--sft", action="store_true", help="write prompt and response")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    try:
        prepare(args.files, args.out, args.limit, args.sft)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    main()
