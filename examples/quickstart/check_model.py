"""Check that the exported model is the trained one: greedy accuracy in plain transformers.

    python examples/quickstart/check_model.py --run outputs/quickstart/grpo_geo_mean \
        --data outputs/quickstart/data/val.parquet

Loads `hf_model` of a run folder with transformers alone, answers the validation prompts greedily
and compares the accuracy with the last one that the run reported, which vLLM's answers gave. Exits
with 1 when they differ by more than one prompt: on a tie of two tokens, rounding decides.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MAX_NEW_TOKENS = 8


def greedy_answers(folder: Path, rows: list[dict]) -> list[str]:
    """Return the model's greedy answer to each row's chat messages."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def reported_accuracy(run: Path) -> float:
    """Return the last validation accuracy in the run's metrics."""
    accuracies = [
        value
        for line in (run / "metrics.jsonl").read_text().splitlines()
        for key, value in json.loads(line).items()
        if key.startswith("eval/") and key.endswith("/accuracy")
    ]
    if not accuracies:
        sys.exit(f"{run}/metrics.jsonl reports no validation")
    return accuracies[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--data", type=Path, required=True, help="validation file")
    args = parser.parse_args()
    logging.disable_progress_bar()
    rows = pyarrow.parquet.read_table(args.data).to_pylist()
    answers = greedy_answers(args.run / "hf_model", rows)
    right = sum(
        answer.strip() == row["ground_truth"] for answer, row in zip(answers, rows, strict=True)
    )
    accuracy, reported = right / len(rows), reported_accuracy(args.run)
    print(f"greedy validation accuracy: transformers {accuracy:.4f}, vLLM reported {reported:.4f}")
    if abs(accuracy - reported) * len(rows) > 1.01:
        sys.exit("the exported model does not answer as the trained one did")


if __name__ == "__main__":
    main()
