"""`mcore-rl verify layouts`: one minibatch gives the same numbers in every parallel layout.

    mcore-rl verify layouts --model /models/Qwen3-0.6B --layouts tp2,pp2,tp2pp2

Every layout trains twice on the same random minibatch in processes of its own, started by the
launcher of training runs; loss, gradient norm and weights are compared with those of one process
that takes the minibatch in one piece. Adam runs with epsilon 1: with the usual 1e-8 its first
updates depend on little but the gradient's sign, and a gradient of the wrong size would pass.

A layout that fails, hangs or departs is a row of the table, and the others go on. Weights travel by
temporary files, of two layouts at a time, so memory holds a few tensors. What is verified is the
trainer: no engine generates here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mcore_rl.dtypes import DTYPES
from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError, require
from mcore_rl.models.rope import check_length
from mcore_rl.types import TokenSequence
from mcore_rl.verify.compare import GRAD_NORM, LOSS, Difference, compare_metrics, compare_weights
from mcore_rl.verify.layout_names import NamedLayout, parse_layout, parse_layouts
from mcore_rl.verify.layout_run import (
    METRICS_FILE,
    MODULE,
    WEIGHTS_FOLDER,
    write_minibatch,
)
from mcore_rl.verify.options import add_limits, check_json, find_whole_model, new_parser
from mcore_rl.verify.processes import run_module
from mcore_rl.verify.runs import check_fits, quoted

ONE_PROCESS = NamedLayout("one", {})
CANDIDATES = (
    "dp1,dp2,tp2,tp2sp0,pp2,pp2vpp2,cp2,ep2,tp2ep2etp1,tp2pp2,tp2cp2,pp2ep2,ep2dp4,tp2pp2ep2etp1"
)
"""Layouts that are run unless the user names some, where the model allows them."""

HEADER = ("layout", "processes", "loss", "grad norm", "weights", "updates", "time", "result")
"""Loss and gradient norm are those of the second update, weights and updates relative differences
from one process (see compare.py)."""
_WIDTHS = (9, 11, 11, 8, 8, 6)

TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2}
"""Relative; bfloat16 rounds activations in another order in every layout."""

_OPTIMIZER = ("actor.optim.eps=1.0", "actor.optim.weight_decay=0.001")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of one layout."""

    layout: str
    processes: int
    seconds: float
    updates: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each update; empty where the layout failed."""
    differences: list[Difference] = field(default_factory=list)
    failure: str = ""
    """Why there are no numbers."""

    @property
    def result(self) -> str:
        """`agrees`, what is wrong, or that others are compared with it."""
        if self.failure:
            return f"failed: {self.failure}"
        if not self.differences:
            return "reference"
        departing = [str(difference) for difference in self.differences if difference.departs]
        return f"departs: {', '.join(departing)}" if departing else "agrees"


def _defaults() -> str:
    return ", ".join(f"{tolerance:g} in {dtype}" for dtype, tolerance in TOLERANCES.items())


def add_parser(parsers: Any) -> None:
    """Add the command to those of `mcore-rl verify`."""
    summary = "one minibatch gives the same numbers in every parallel layout"
    parser = new_parser(parsers, "layouts", summary, __doc__, run)
    add = parser.add_argument
    add("--layouts", help="such as tp2pp2,pp2vpp2,tp2sp0,ep2dp4; default: what the model allows")
    add("--loss", default="geo_mean", help="a registered policy loss")
    add("--dtype", default="float32", help=" or ".join(DTYPES))
    add("--tolerance", type=float, help=f"relative; default: {_defaults()}")
    add("--lr", type=float, default=1.0, help="learning rate, with Adam's epsilon at 1")
    add("--sequences", type=int, default=8, help="in the minibatch")
    add("--max-length", type=int, default=32, help="tokens of the longest sequence")
    add("--micro-batches", type=int, default=3, help="at most so many per data-parallel rank")
    add_limits(
        parser,
        seed_of="the minibatch",
        layout="a layout",
        timed="one layout",
        written="the numbers",
    )


def run(args: argparse.Namespace) -> int:
    """Check every input, then run and compare the layouts; return the exit code."""
    check_numbers(args)
    hf_config = find_whole_model(args)
    check_length(hf_config, args.max_length, "--max-length")
    layouts = chosen_layouts(args, hf_config)
    tolerance = args.tolerance or TOLERANCES[args.dtype]  # the dtype is checked by now
    with tempfile.TemporaryDirectory(prefix="verify-layouts-", ignore_cleanup_errors=True) as work:
        rows = compare_layouts(args, layouts, hf_config.vocab_size, tolerance, Path(work))
    num_agreeing = sum(row.result == "agrees" for row in rows[1:])
    sys.stdout.write(
        f"{num_agreeing} of {len(layouts)} layouts agree with one process within {tolerance:g}\n"
    )
    if args.json:
        args.json.write_text(to_json(rows, tolerance), encoding="utf-8")
    return 0 if num_agreeing == len(layouts) else 1


def check_numbers(args: argparse.Namespace) -> None:
    """Raise a UserError for a number out of range."""
    for name in ("sequences", "micro_batches", "lr", "timeout", "tolerance", "max_processes"):
        value = getattr(args, name)
        key = f"--{name.replace('_', '-')}"
        require(value is None or value > 0, key, value, "must be greater than 0")
    require(args.max_length >= 2, "--max-length", args.max_length, "must be at least 2")
    check_json(args)


def chosen_layouts(args: argparse.Namespace, hf_config: Any) -> list[NamedLayout]:
    """Return the layouts to run: those the user named, or those of `CANDIDATES` that fit.

    Raises:
        UserError: for a name, size or number of processes that cannot be run.
    """
    check_one(args, ONE_PROCESS, hf_config)  # what is wrong with every layout names none
    if args.layouts is not None:
        layouts = parse_layouts(args.layouts)
        for layout in layouts:
            try:
                check_one(args, layout, hf_config)
            except UserError as error:
                raise UserError(f"--layouts {layout.name}: {error}") from error
        return layouts
    fitting = []
    for name in CANDIDATES.split(","):
        with contextlib.suppress(UserError):
            check_one(args, parse_layout(name), hf_config)
            fitting.append(parse_layout(name))
    return fitting


def check_one(args: argparse.Namespace, layout: NamedLayout, hf_config: Any) -> None:
    """Raise a UserError unless the layout divides the model and fits on this machine."""
    check_fits(MODULE, overrides(args, layout), hf_config, args.max_processes)


def overrides(args: argparse.Namespace, layout: NamedLayout) -> list[str]:
    """Return the configuration of the layout's run, less its folder."""
    one_piece = layout is ONE_PROCESS
    num_pieces = 1 if one_piece else layout.dp * args.micro_batches
    return [
        f"model.path={quoted(args.model)}",
        f"data.max_response_length={args.max_length}",
        f"actor.policy_loss.loss_mode={args.loss}",
        f"actor.megatron.dtype={args.dtype}",
        f"actor.optim.lr={args.lr}",
        *_OPTIMIZER,
        "actor.ppo_epochs=2",
        f"actor.ppo_micro_batch_size_per_gpu={math.ceil(args.sequences / num_pieces)}",
        *layout.overrides,
    ]


def random_minibatch(args: argparse.Namespace, vocab_size: int) -> list[TokenSequence]:
    """Return sequences of random tokens: ragged prompts and responses, one advantage for each.

    Only responses train. A sequence may have one token, which predicts nothing.
    """
    rng = random.Random(args.seed)
    sequences = []
    for number in range(args.sequences):
        length = args.max_length if number == 0 else rng.randint(1, args.max_length)
        prompt_length = rng.randint(1, max(1, length // 2))
        loss_mask = np.arange(length) >= prompt_length
        advantage = rng.gauss(0, 1)
        sequences.append(
            TokenSequence(
                token_ids=np.array([rng.randrange(vocab_size) for _ in range(length)], np.int32),
                loss_mask=loss_mask,
                advantages=np.where(loss_mask, np.float32(advantage), np.float32(0)),
            )
        )
    return sequences


def compare_layouts(
    args: argparse.Namespace,
    layouts: Sequence[NamedLayout],
    vocab_size: int,
    tolerance: float,
    work: Path,
) -> list[Row]:
    """Run one process, then every layout; write a line as each ends, and return the rows.

    Raises:
        UserError: if one process cannot train on the minibatch, so that there is nothing to
            compare with.
    """
    write_minibatch(work, random_minibatch(args, vocab_size))
    width = max(len(layout.name) for layout in (ONE_PROCESS, *layouts))
    _say(table_line(width, *HEADER))
    expected = run_layout(args, ONE_PROCESS, work)
    _say(table_line(width, *cells(expected)))
    check_reference(expected)
    rows = [expected]
    for layout in layouts:
        row = run_layout(args, layout, work)
        if not row.failure:
            row = compared(row, expected, work, args.model, tolerance)
        shutil.rmtree(work / layout.name)
        _say(table_line(width, *cells(row)))
        rows.append(row)
    return rows


def run_layout(args: argparse.Namespace, layout: NamedLayout, work: Path) -> Row:
    """Train in one layout; its weights stay in its folder in `work`."""
    folder = work / layout.name
    folder.mkdir()
    argv = [*overrides(args, layout), f"trainer.default_local_dir={quoted(folder)}"]
    start = time.perf_counter()
    ended = run_module(MODULE, argv, folder / "log.txt", args.timeout)
    row = Row(
        layout=layout.name,
        processes=layout.num_processes,
        seconds=time.perf_counter() - start,
    )
    if ended.exit_code != 0:
        if ended.exit_code != USER_ERROR_EXIT_CODE:
            sys.stderr.write(ended.log)
        return replace(row, failure=ended.reason)
    return replace(row, updates=json.loads((folder / METRICS_FILE).read_text(encoding="utf-8")))


def check_reference(row: Row) -> None:
    """Raise a UserError unless one process has trained: else nothing could depart from it."""
    if row.failure:
        raise UserError(f"one process cannot train on the minibatch: {row.failure}")
    norms = [update.get(GRAD_NORM, math.nan) for update in row.updates]
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise UserError(
            f"one process has gradient norms {norms} on the minibatch, so it shows nothing. Try "
            "another --seed, more --sequences or a smaller --lr."
        )


def compared(row: Row, expected: Row, work: Path, model: Path, tolerance: float) -> Row:
    """Return the row with its differences from the expected one, or with why there are none."""
    weights, expected_weights = (work / r.layout / WEIGHTS_FOLDER for r in (row, expected))
    try:
        differences = [
            *compare_metrics(row.updates, expected.updates, tolerance),
            *compare_weights(weights, expected_weights, model, tolerance),
        ]
    except ValueError as error:
        return replace(row, failure=str(error))
    return replace(row, differences=differences)


def cells(row: Row) -> list[str]:
    """Return what the table says of a row, in the order of `HEADER`."""
    last = row.updates[-1] if row.updates else {}
    size_of = {difference.measure: difference.size for difference in row.differences}
    return [
        row.layout,
        str(row.processes),
        *(f"{last[key]:.7f}" if key in last else "-" for key in (LOSS, GRAD_NORM)),
        *(f"{size_of[key]:.1e}" if key in size_of else "-" for key in ("weights", "updates")),
        f"{row.seconds:.0f} s",
        row.result,
    ]


def table_line(width: int, name: str, *columns: str) -> str:
    """Return one line of the table; `width` is that of the layout's name."""
    *numbers, result = columns
    padded = [cell.rjust(width) for cell, width in zip(numbers, _WIDTHS, strict=True)]
    return "  ".join([name.ljust(width), *padded, result])


def to_json(rows: Sequence[Row], tolerance: float) -> str:
    """Return the numbers of all rows, the first of which is one process."""
    layouts = [asdict(row) | {"result": row.result} for row in rows]
    return json.dumps({"tolerance": tolerance, "layouts": layouts}, indent=2) + "\n"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
