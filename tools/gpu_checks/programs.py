"""The checks in the order in which they run, and the process that runs some of them."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from gpu_checks.attention import attention
from gpu_checks.checkpoint import checkpoint
from gpu_checks.engine import sleep, sync_dense, sync_moe
from gpu_checks.logits import logits_bfloat16, logits_float32
from gpu_checks.logprob_memory import logprob_memory
from gpu_checks.outcome import Outcome, SkippedError, Values, free_memory
from gpu_checks.packing import packing
from gpu_checks.run import engine_apart, engine_of_two_ranks, twenty_steps
from gpu_checks.sizes import SIZES, Sizes
from gpu_checks.speed import step_dense, step_many_experts, step_moe
from gpu_checks.stack import stack
from gpu_checks.update import update_layers, update_on_cpu

Check = Callable[[Sizes, torch.device], Outcome]

PROGRAMS: Mapping[str, Mapping[str, Check]] = {
    "numbers": {
        "stack": stack,
        "attention": attention,
        "logits float32": logits_float32,
        "logits bfloat16": logits_bfloat16,
        "packing": packing,
        "update on CPU": update_on_cpu,
        "update layers": update_layers,
        "checkpoint": checkpoint,
        "logprob memory": logprob_memory,
        "step dense": step_dense,
        "step moe": step_moe,
        "step 128 experts": step_many_experts,
    },
    # On CPU vLLM takes torch's streams away when its first engine starts, and experts want them.
    "engine": {
        "sync moe": sync_moe,
        "sync dense": sync_dense,
        "sleep": sleep,
    },
    "runs": {
        "engine apart": engine_apart,
        "engine of two ranks": engine_of_two_ranks,
        "twenty steps": twenty_steps,
    },
}
"""By program: its checks, by name."""

ALONE = ("numbers", "engine")
"""Programs that are a train worker themselves."""

CHECKS = {name: check for checks in PROGRAMS.values() for name, check in checks.items()}


def run_program(names: Iterable[str], device_type: str, rows: Path, *, is_worker: bool) -> None:
    """Run checks one after the other in this process; print and write a row for each.

    Args:
        names: of the checks.
        device_type: "cuda" or "cpu".
        rows: file that a line of JSON is added to when a check has ended.
        is_worker: whether the checks need this process to be a train worker.
    """
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if is_worker and device.type == "cuda":
        torch.cuda.set_device(device)
    for name in names:
        row = run_check(name, CHECKS[name], device_type, device)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        sys.stdout.write(line_of(row))
        sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


def run_check(name: str, check: Check, device_type: str, device: torch.device) -> Values:
    """Run one check and return its row: name, status, seconds, values, bounds, reason."""
    start = time.perf_counter()
    outcome, status, reason = Outcome({}), "passed", ""
    try:
        outcome = check(SIZES[device_type], device)
        if faults := outcome.faults:
            status, reason = "FAILED", "; ".join(faults)
    except SkippedError as skipped:
        status, reason = "skipped", str(skipped)
    except Exception as error:  # noqa: BLE001 - the other checks are to run
        status, reason = "FAILED", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    free_memory(device)
    return {
        "check": name,
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "values": {k: v.item() if hasattr(v, "item") else v for k, v in outcome.values.items()},
        "bounds": [dataclasses.asdict(bound) for bound in outcome.bounds],
        "reason": reason,
    }


def line_of(row: Values) -> str:
    """Return the line of the table, and what is wrong below it."""
    numbers = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row["values"].items()
    )
    line = f"{row['check']:<20} {row['status']:<7} {row['seconds']:>6.1f} s  {numbers}\n"
    return line + (f"{'':<20} {row['reason']}\n" if row["reason"] else "")
