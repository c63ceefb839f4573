"""Programs scored per second by the reward `code`, as a run does it.

    python benchmarks/sandbox.py                       # 1,000 programs of 5 tests, every CPU
    python benchmarks/sandbox.py --programs 200 --workers 2

Programs are of six kinds, turn about: right, wrong, raising, and the three that cost most: an
endless loop, one that fills the memory, one that prints without end; the last three are one in
fifty each. Every score is compared with what the kind must get; exit code 1 where one differs.
"""

from __future__ import annotations

import argparse
import collections
import os
import resource
import sys
import time

from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig, SandboxConfig
from mcore_rl.rewards.code import compute_score
from mcore_rl.rewards.pool import RewardPool
from mcore_rl.rewards.worker import RewardCall

RIGHT = "n = int(input())\nprint(sum(i * i for i in range(n)))"
COMMON = {"right": RIGHT, "wrong": "print(int(input()) ** 2)", "raises": "print(1 / 0)"}
COSTLY = {
    "loops": "while True: pass",
    "fills memory": "x = ['x']\nwhile True: x += x",
    "prints": "while True: print('x' * 2**16)",
}


def kind_of(index: int) -> str:
    """Return the kind of a program: three in fifty are costly."""
    costly = dict(zip((7, 23, 41), COSTLY, strict=True))
    return costly.get(index % 50) or list(COMMON)[index % 3]


def main() -> int:
    """Score, print the figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--tests", type=int, default=5)
    parser.add_argument("--workers", type=int, default=None)
    args = parser.parse_args()

    sizes = range(100, 100 + args.tests)
    tests = {
        "inputs": [f"{n}\n" for n in sizes],
        "outputs": [str(sum(i * i for i in range(n))) for n in sizes],
    }
    sandbox = SandboxConfig(cpu_s=1)
    cfg = RewardConfig(num_workers=args.workers, sandbox=sandbox)
    kinds = [kind_of(index) for index in range(args.programs)]
    calls = [
        RewardCall(
            function=compute_score,
            arguments={
                "data_source": "code",
                "solution_str": f"```python\n{(COMMON | COSTLY)[kind]}\n```",
                "ground_truth": tests,
                "sandbox": sandbox,
            },
        )
        for kind in kinds
    ]
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
    print(f"programs        {args.programs}, {args.tests} tests each, stopping at a failed one")
    print(f"kinds           {dict(collections.Counter(kinds))}")
    print(f"workers         {cfg.max_workers} on {len(os.sched_getaffinity(0))} CPUs")
    print(f"wall time       {seconds:.1f} s, load {os.getloadavg()[0]:.1f}")
    print(f"CPU time        {used.ru_utime + used.ru_stime:.1f} s")
    print(f"programs per s  {args.programs / seconds:.1f}")
    print(f"wrong scores    {dict(differing) or 'none'}")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
