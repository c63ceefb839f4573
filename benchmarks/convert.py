"""Time and memory of the two conversions, against copying the same files.

    python benchmarks/convert.py --gib 4
    python benchmarks/convert.py --gib 0.1 --folder /mnt/disk     # a small one, on that disk

Makes a random Qwen3-MoE checkpoint (bfloat16, shards of about 1 GB) in a temporary folder and runs
`mcore-rl convert` in both directions, each in a process of its own and turn about with `cp -r` of
the same files and `sync`; the page cache is warm for both. Figures are medians of `--rounds`.
`seconds` is what a user waits for. The ratio leaves out what goes by until the imports are done.

Memory is the largest sum of anonymous and mapped file pages that the process ever held: ru_maxrss
of the child. (It is never below that of this process, which forked it: 0.4 GB.)

Exit code 1 if a limit is missed: 1.5 GB of memory; twice the time of the copy, without imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from mcore_rl.models.safetensors_io import INDEX_FILE, index_text, plan_shards
from mcore_rl.models.spec import model_family

MEMORY_LIMIT_GB = 1.5
TIME_LIMIT = 2.0

EXPERT_LAYER = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 3072,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make_checkpoint(folder: Path, num_bytes: int) -> None:
    """Write a checkpoint of about `num_bytes`."""
    config = Qwen3MoeConfig(**EXPERT_LAYER, num_hidden_layers=1)
    shapes = _shapes(config)
    outside = 2 * sum(s.numel() for n, s in shapes.items() if ".layers." not in n)
    layer = 2 * sum(s.numel() for n, s in shapes.items() if ".layers." in n)
    config.num_hidden_layers = max(1, round((num_bytes - outside) / layer))
    config.save_pretrained(folder)
    shapes = _shapes(config)
    on_meta = (
        (name, torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        for name, shape in shapes.items()
    )
    shards = plan_shards(on_meta, 10**9)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        tensors = {
            name: torch.randint(-(2**14), 2**14, shapes[name], generator=generator)
            .to(torch.int16)
            .view(torch.bfloat16)
            for name in shard.names
        }
        save_file(tensors, folder / shard.file_name, {"format": "pt"})
    (folder / INDEX_FILE).write_text(index_text(shards))


TIMED = """
import sys, time
import mcore_rl.convert.convert
from mcore_rl.convert.__main__ import main

start = time.monotonic()
try:
    main(sys.argv[2:])
finally:
    open(sys.argv[1], "w").write(str(time.monotonic() - start))
"""


def measured(command: list[str]) -> tuple[float, float]:
    """Run a command and return (seconds, peak resident memory in GB)."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9


def settle() -> None:
    """Let what was written and freed before come to rest.

    A virtual machine gives freed memory back to its host after some seconds, and has to ask for it
    again: here `cp` takes 2 seconds just after a removal and 7 seconds a little later. A conversion
    begins to write seconds after its start, so the copy has to wait as well.
    """
    os.sync()
    time.sleep(5)


def copied(source: Path, target: Path) -> float:
    """Return the seconds that copying a folder and `sync` of the copy take."""
    seconds, _ = measured(["sh", "-c", f"cp -r '{source}' '{target}' && sync -f '{target}'"])
    shutil.rmtree(target)
    return seconds


def run(folder: Path, num_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """Measure both directions in `folder`."""
    hf, mcore, back, copy = (folder / name for name in ("hf", "mcore", "back", "copy"))
    # In a process of its own: what this one ever held would count as its children's.
    maker = multiprocessing.get_context("spawn").Process(
        target=make_checkpoint, args=(hf, num_bytes)
    )
    maker.start()
    maker.join()
    total = json.loads((hf / INDEX_FILE).read_text())["metadata"]["total_size"]
    inside = folder / "seconds"
    convert = [sys.executable, "-c", TIMED, str(inside)]
    rows: list[dict[str, Any]] = []
    for direction, source, target in (("hf-to-mcore", hf, mcore), ("mcore-to-hf", mcore, back)):
        copies, conversions, without_imports, memory = [], [], [], 0.0
        for _ in range(rounds):
            shutil.rmtree(target, ignore_errors=True)
            settle()
            copies.append(copied(source, copy))
            settle()
            seconds, peak = measured([*convert, direction, str(source), str(target)])
            conversions.append(seconds)
            without_imports.append(float(inside.read_text()))
            memory = max(memory, peak)
        row = {
            "direction": direction,
            "size_gb": round(total / 1e9, 2),
            "seconds": [round(seconds, 2) for seconds in conversions],
            "cp_sync_seconds": [round(seconds, 2) for seconds in copies],
            "without_imports": [round(seconds, 2) for seconds in without_imports],
            "time_ratio": round(median(without_imports) / median(copies), 2),
            "peak_rss_gb": round(memory, 2),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _shapes(config: Qwen3MoeConfig) -> dict[str, torch.Size]:
    entries = model_family(config).entries(config)
    return {hf.name: torch.Size(hf.shape) for entry in entries for hf in entry.mapping.sources}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where to work; default: temporary files'")
    parser.add_argument("--rounds", type=int, default=3, help="of copy and conversion")
    args = parser.parse_args()
    num_bytes = int(args.gib * 2**30)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="convert-") as folder:
        free = shutil.disk_usage(folder).free
        needed = 4 * num_bytes + 2**30  # three checkpoints, a copy, and room for others
        if free < needed:
            parser.error(f"{folder} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} needed")
        rows = run(Path(folder), num_bytes, args.rounds)
    sys.exit(
        int(
            any(
                row["peak_rss_gb"] > MEMORY_LIMIT_GB or row["time_ratio"] > TIME_LIMIT
                for row in rows
            )
        )
    )


if __name__ == "__main__":
    main()
