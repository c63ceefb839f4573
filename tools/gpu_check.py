"""Check on a CUDA device what the tests check on CPU: numbers, then memory and speed, then runs.

    python tools/gpu_check.py --out gpu_check.json

Needs no network and no checkpoint: models with random weights are written to a temporary folder.
Each check gives numbers and says which of them are bounded and why; one that fails or raises does
not stop the others. Prints a table, writes a JSON file, exits with 1 if a check failed. `--device
cpu` runs the same code on small sizes: it tests the checks, and no speed. What they mean, and what
of the package has run on CUDA so far: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_checks.outcome import Values
from gpu_checks.programs import ALONE, CHECKS, PROGRAMS, line_of, run_program
from gpu_checks.stack import versions

from mcore_rl.processes import ending

_PROGRAM_S = 900


def number(text: str) -> int | None:
    return None if text == "auto" else int(text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", choices=CHECKS, nargs="*", help="run these checks only")
    parser.add_argument(
        "--nproc", type=number, help="ranks of the runs, 1 or 2; auto: as many as there are devices"
    )
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def ended(program: str, names: list[str], device: str) -> list[Values]:
    """Run a program and return its rows; a check that its process did not live through failed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        argv = [__file__, "--device", device, "--program", program, "--out", rows, "--only", *names]
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *map(str, argv)], timeout=_PROGRAM_S
            )
            how = ending(done.returncode)
        except subprocess.TimeoutExpired:
            how = f"no end within {_PROGRAM_S} s"
        found = [json.loads(line) for line in rows.read_text().splitlines()]
    for name in names[len(found) :]:
        row = {"check": name, "status": "FAILED", "values": {}, "bounds": []}
        row |= {"seconds": round(time.monotonic() - start, 1)}
        found.append(row | {"reason": f"the process of {program}: {how}"})
        sys.stdout.write(line_of(found[-1]))
    return found


def main() -> int:
    args = parsed()
    names = args.only or [*CHECKS]
    if args.program:
        run_program(names, args.device, args.out, is_worker=args.program in ALONE)
        return 0
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("torch sees no CUDA device; --device cpu runs the checks on small sizes instead")
        return 2
    devices = 2 if on_cpu else torch.cuda.device_count()
    os.environ["GPU_CHECK_NPROC"] = str(args.nproc or min(2, devices))
    name = platform.machine() if on_cpu else torch.cuda.get_device_name(0)
    print(f"{name}: {', '.join(f'{k} {v}' for k, v in versions().items() if v)}", flush=True)
    start = time.monotonic()
    rows: list[Values] = []
    for program, checks in PROGRAMS.items():
        if chosen := [check for check in checks if check in names]:
            rows += ended(program, chosen, args.device)
    result = {
        "device": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "versions": versions(),
        "checks": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = [row["check"] for row in rows if row["status"] == "FAILED"]
    passed = sum(row["status"] == "passed" for row in rows)
    print(f"{passed} of {len(rows)} checks passed; written to {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
