"""Programs scored per second by the reward `code`, as a run does it.

    python benchmarks/sandbox.py                       # 1,000 programs of 5 tests, every CPU
    python benchmarks/sandbox.py --programs 200 --workers 2
    python benchmarks/sandbox.py --ordinary --against ../before   # another state of the code

The three forms of tests come turn about: standard input, calls, assertions. Programs are of six
kinds, turn about: right, wrong, raising, and the three that cost most: an endless loop, one that
fills the memory, one that prints without end; the last three are one in fifty each, and left out
with `--ordinary`. Every score is compared with what the kind must get; exit code 1 where one
differs.

With `--against` both states are measured in turn, `--rounds` times each, and the ratios are those
of the sums: of CPU time, which other work on the machine disturbs least, and of wall time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig, SandboxConfig
from mcore_rl.rewards.code import compute_score
from mcore_rl.rewards.pool import RewardPool
from mcore_rl.rewards.worker import RewardCall

COMMON = {
    "right": "def f(n): return sum(i * i for i in range(n))",
    "wrong": "def f(n): return n ** 2",
    "raises": "def f(n): return 1 / 0",
}
COSTLY = {
    "loops": "while True: pass",
    "fills memory": "x = ['x']\nwhile True: x += x",
    "prints": "while True: print('x' * 2**16, flush=True)",
}
FORMS = ("input", "calls", "assertions")


def kind_of(index: int, ordinary: bool) -> str:
    """Return the kind of a program: three in fifty are costly."""
    costly: dict[int, str] = {} if ordinary else dict(zip((7, 23, 41), COSTLY, strict=True))
    return costly.get(index % 50) or list(COMMON)[index % 3]


def form_of(index: int) -> str:
    """Return the form of the tests of a program; every kind meets every form."""
    return FORMS[index // 3 % 3]


def tests_of(form: str, num_tests: int) -> dict:
    """Return tests of a function or program that sums squares."""
    cases = {n: sum(i * i for i in range(n)) for n in range(100, 100 + num_tests)}
    if form == "input":
        return {"inputs": [f"{n}\n" for n in cases], "outputs": list(map(str, cases.values()))}
    if form == "calls":
        return {"fn_name": "f", "inputs": [[n] for n in cases], "outputs": list(cases.values())}
    return {"assert_case": [f"assert f({n}) == {square}" for n, square in cases.items()]}


def main() -> int:
    """Score, print the figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--tests", type=int, default=5)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--ordinary", action="store_true", help="no costly programs")
    parser.add_argument("--against", type=Path, help="folder of another state of the code")
    parser.add_argument("--rounds", type=int, default=3, help="of --against")
    parser.add_argument("--json", action="store_true", help="the figures as one line of JSON")
    args = parser.parse_args()
    if args.against is not None:
        return compare(args)
    figures = measure(args)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, figure in figures.items():
            print(f"{name:<16}{figure:.1f}" if isinstance(figure, float) else f"{name:<16}{figure}")
    return int(bool(figures["wrong scores"]))


def measure(args: argparse.Namespace) -> dict:
    """Score the programs and return the figures."""
    sandbox = SandboxConfig(cpu_s=1)
    cfg = RewardConfig(num_workers=args.workers, sandbox=sandbox)
    kinds = [kind_of(index, args.ordinary) for index in range(args.programs)]
    calls = []
    for index, kind in enumerate(kinds):
        form = form_of(index)
        program = (COMMON | COSTLY)[kind] + ("\nprint(f(int(input())))" if form == "input" else "")
        arguments = {
            "data_source": "code",
            "solution_str": f"```python\n{program}\n```",
            "ground_truth": tests_of(form, args.tests),
            "sandbox": sandbox,
        }
        calls.append(RewardCall(function=compute_score, arguments=arguments))
    pool = RewardPool(cfg, CustomRewardConfig())
    pool.start()
    start = time.perf_counter()
    outcomes = dict(pool.run(calls))
    seconds = time.perf_counter() - start
    pool.close()
    differing = collections.Counter(
        kind
        for index, kind in enumerate(kinds)
        if outcomes[index].error or outcomes[index].score != float(kind == "right")
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "programs": args.programs,
        "tests": f"up to {args.tests} each, stopping at a failed one",
        "kinds": dict(collections.Counter(kinds)),
        "workers": f"{cfg.max_workers} on {len(os.sched_getaffinity(0))} CPUs",
        "load": os.getloadavg()[0],
        "wall time s": seconds,
        "CPU time s": used.ru_utime + used.ru_stime,
        "programs per s": args.programs / seconds,
        "wrong scores": dict(differing),
    }


def compare(args: argparse.Namespace) -> int:
    """Measure this state and another in turn, print the ratios and return the exit code."""
    here = Path(__file__).resolve().parents[1]
    given = ["--json", "--programs", str(args.programs), "--tests", str(args.tests)]
    given += ["--ordinary"] if args.ordinary else []
    given += ["--workers", str(args.workers)] if args.workers else []
    totals: dict[Path, collections.Counter] = {
        args.against.resolve(): collections.Counter(),
        here: collections.Counter(),
    }
    wrong: dict[Path, dict] = {}
    for _ in range(args.rounds):
        for state, total in totals.items():
            answer = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), *given],
                cwd=state,  # the scoring processes import what lies in their working folder
                env={**os.environ, "PYTHONPATH": str(state)},
                stdout=subprocess.PIPE,
                check=False,
            )
            figures = json.loads(answer.stdout)
            wrong[state] = figures["wrong scores"]
            total.update({name: figures[name] for name in ("CPU time s", "wall time s")})
    before, now = totals.values()
    for name in before:
        ratio = now[name] / before[name]
        print(f"{name:<16}{before[name]:.1f} before, {now[name]:.1f} now: {ratio:.2f}")
    print(f"wrong scores    {[wrong[state] or 'none' for state in totals]} before, now")
    return int(bool(wrong[here]))


if __name__ == "__main__":
    sys.exit(main())
