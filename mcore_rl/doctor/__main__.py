"""`mcore-rl doctor [CHECK ...]`, also `python -m mcore_rl.doctor`: is this installation healthy?

    mcore-rl doctor                       all checks
    mcore-rl doctor torchvision disk      some of them
    mcore-rl doctor --quick               none that computes something
    torchrun --nnodes 2 --nproc-per-node 1 ... -m mcore_rl.cli doctor --nodes
                                          on every node: which one differs from the others
    RAY_ADDRESS=... mcore-rl doctor --nodes
                                          the same of the machines of a Ray cluster

Exit code 0: healthy, whatever is absent or a warning; 1: a fault, or nodes that differ; 2: a
mistake in the command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from mcore_rl.doctor.checks import ALL_CHECKS, CHECKS, LIVE_CHECKS, run_checks
from mcore_rl.doctor.nodes import Rendezvous, Report, differences
from mcore_rl.doctor.rows import is_healthy
from mcore_rl.doctor.site import Node, Site, node_of_torchrun
from mcore_rl.doctor.table import print_differences, print_fixes, print_rows
from mcore_rl.errors import USER_ERROR_EXIT_CODE, RunError, UserError, closest_hint, require

DEADLINE_S = 180.0
"""Ten times what the longest probe takes on two idle cores."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    args = _parser().parse_args(argv)
    try:
        sys.exit(run(args))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_EXIT_CODE)
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def run(args: argparse.Namespace) -> int:
    """Run the checks, say what they found and return the exit code."""
    _check(args)
    if args.nodes and "RANK" not in os.environ:
        return 0 if _in_cluster(args) else 1
    if args.nodes and os.environ.get("LOCAL_RANK", "0") != "0":
        return 0  # one process looks at a node
    node = node_of_torchrun() if args.nodes else None
    names = args.checks or (CHECKS if args.quick else ALL_CHECKS)
    site = Site(
        run_folder=args.run_folder,
        deadline_s=args.deadline,
        node=node,
        live=frozenset(LIVE_CHECKS).intersection(names),
    )
    if sys.stderr.isatty():
        sys.stderr.write("checking; takes about half a minute on two cores\n")
    healthy = _alone(args, names, site) if node is None else _on_nodes(args, names, site, node)
    return 0 if healthy else 1


def _check(args: argparse.Namespace) -> None:
    for name in args.checks:
        if name not in ALL_CHECKS:
            hint = closest_hint(name, ALL_CHECKS) or f" There are {', '.join(ALL_CHECKS)}."
            raise UserError(f"{name!r} is no check.{hint}")
    unread = bool(args.checks) and args.quick
    require(not unread, "--quick", True, "is not read beside names of checks", "Leave it out.")
    require(args.deadline > 0, "--deadline", args.deadline, "must be > 0")
    command = "torchrun --nnodes N --nproc-per-node 1 ... -m mcore_rl.cli doctor --nodes"
    is_launched = "RANK" in os.environ
    finds_nodes = is_launched or "RAY_ADDRESS" in os.environ
    fix = f"On every node: {command}; or set RAY_ADDRESS to that of a cluster."
    require(finds_nodes or not args.nodes, "--nodes", True, "needs torchrun or Ray", fix)
    if is_launched and not args.nodes:
        raise UserError("torchrun started this process: add --nodes, or start one without it.")


def _alone(args: argparse.Namespace, names: Iterable[str], site: Site) -> bool:
    """Look at this machine; return whether it is healthy."""
    began = time.monotonic()
    rows = run_checks(names, site)
    healthy = is_healthy(rows)
    if args.json:
        _write_json({"healthy": healthy, "rows": [row.to_json() for row in rows]})
        return healthy
    print_rows(rows)
    print_fixes([Report(0, "", rows)])
    sys.stdout.write(f"{_verdict(healthy)}, in {time.monotonic() - began:.0f} s\n")
    return healthy


def _on_nodes(args: argparse.Namespace, names: Iterable[str], site: Site, node: Node) -> bool:
    """Look at this machine as one of several; return whether all are healthy and alike."""
    # A node may have been slow in several checks before the others see that it is.
    rendezvous = Rendezvous(node, limit_s=3 * args.deadline)
    rows = run_checks(names, site)
    if node.number > 0:
        return rendezvous.send(rows)
    healthy = _tell(args, rendezvous.reports(rows))
    sys.stdout.flush()
    rendezvous.tell(healthy)
    return healthy


def _in_cluster(args: argparse.Namespace) -> bool:
    """Have the machines of a Ray cluster look at themselves; return whether all are healthy and
    alike."""
    from mcore_rl.doctor.by_ray import reports_of_nodes

    arguments = [*args.checks, *(["--quick"] if args.quick else [])]
    arguments += ["--run-folder", str(args.run_folder.absolute()), "--deadline", str(args.deadline)]
    return _tell(args, reports_of_nodes(os.environ["RAY_ADDRESS"], arguments, 3 * args.deadline))


def _tell(args: argparse.Namespace, reports: Sequence[Report]) -> bool:
    """Say what the nodes found; return whether all are healthy and alike."""
    differ = differences(reports)
    healthy = not differ and all(is_healthy(report.rows) for report in reports)
    if args.json:
        shown = [
            {"name": one.name, "majority": one.majority, "outliers": dict(one.outliers)}
            for one in differ
        ]
        nodes = [report.to_json() for report in reports]
        _write_json({"healthy": healthy, "differences": shown, "nodes": nodes})
    else:
        sys.stdout.write(f"{reports[0].name}:\n")
        print_rows(reports[0].rows)
        print_differences(differ, reports)
        print_fixes(reports)
        sys.stdout.write(f"{_verdict(healthy)}, {len(reports)} nodes\n")
    return healthy


def _verdict(healthy: bool) -> str:
    return "healthy" if healthy else "not healthy"


def _write_json(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value, indent=1)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mcore-rl doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checks", nargs="*", metavar="CHECK", help="name of a line; default: all")
    add("--quick", action="store_true", help="leave out what computes something")
    add("--nodes", action="store_true", help="compare the nodes of torchrun, or of Ray")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    add(
        "--run-folder",
        type=Path,
        default=Path("outputs"),
        help="trainer.default_local_dir of the run; default: outputs",
    )
    add("--deadline", type=float, default=DEADLINE_S, help="seconds that a probe may take")
    return parser


if __name__ == "__main__":
    main()
