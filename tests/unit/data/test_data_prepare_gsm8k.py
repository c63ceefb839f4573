import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mcore_rl.data.prompts import DataConfig, load_prompts, load_sft_sequences

pytestmark = pytest.mark.starts_processes

TOOL = Path(__file__).parents[3] / "tools" / "prepare_gsm8k.py"
RAW = [
    {"question": "Two and three?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
    {"question": "How many?", "answer": "Many.\n#### 1,080"},
]


@pytest.fixture
def prepare(tmp_path):
    """Return a function that runs the tool on raw files in `tmp_path` and returns the result."""

    def run(*arguments):
        command = [sys.executable, str(TOOL), *arguments, "--out", "out"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_raw_files_become_prompts_with_reference_answers(tmp_path, prepare, tokenizer, write_jsonl):
    write_jsonl(RAW, "train.jsonl")
    write_jsonl(RAW[:1], "test.jsonl")
    assert prepare("train.jsonl", "test.jsonl").returncode == 0
    files = [str(tmp_path / "out" / name) for name in ("train.parquet", "test.parquet")]
    prompts = load_prompts(files, DataConfig(), tokenizer)
    assert [prompt.ground_truth for prompt in prompts] == ["5", "1080", "5"]
    assert {prompt.data_source for prompt in prompts} == {"gsm8k"}
    assert prompts[1].extra_info == {"index": 1, "answer": RAW[1]["answer"]}
    assert "How many?\n" in prompts[1].text


def test_sft_rows_hold_the_worked_answer_and_limit_counts_rows(
    tmp_path, prepare, tokenizer, write_jsonl
):
    write_jsonl(RAW, "train.jsonl")
    assert prepare("train.jsonl", "--sft", "--limit", "1").returncode == 0
    path = tmp_path / "out" / "train_sft.parquet"
    assert [row["response"] for row in pq.read_table(path).to_pylist()] == [RAW[0]["answer"]]
    (sequence,) = load_sft_sequences(str(path), DataConfig(), tokenizer)
    assert sum(sequence.loss_mask) == len(RAW[0]["answer"]) + 1  # one token per character, and end


@pytest.mark.parametrize(
    ("rows", "arguments", "problem"),
    [
        ([{"question": "a", "answer": "no mark"}], ["raw.jsonl"], "row 0, column 'answer': .*####"),
        ([{"question": "a", "answer": "#### "}], ["raw.jsonl"], "row 0, column 'answer': .*####"),
        ([{"answer": "#### 1"}], ["raw.jsonl"], "row 0, column 'question'"),
        (RAW, ["other.jsonl"], "other.jsonl: there is no such file"),
        (RAW, ["raw.jsonl", "raw.jsonl"], "same name"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(prepare, write_jsonl, rows, arguments, problem):
    write_jsonl(rows, "raw.jsonl")
    result = prepare(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert re.match(f"error: .*{problem}", line)
