"""CPU time of every reward of text on degenerate responses: what it grows with.

    python benchmarks/rewards.py                                # 100 kB and 1 MB: an hour
    python benchmarks/rewards.py --length 10000 --reward qa --every 7

Every unit of `tests/degenerate_texts.py` is repeated between every pair of affixes, up to the
length and to ten times it. Printed for each reward: the worst ratio of the two times, of texts that
take at least 50 ms at ten times the length (below that the clock decides), and the slowest text.
Exit code 1 where a ratio exceeds 12.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tests`

import mcore_rl.rewards  # noqa: F401  registers them
from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.piecewise_continuity import EXAMPLE
from tests.degenerate_texts import repeated

REFERENCES = {
    "gsm8k": "5", "math_reasoning": "5", "arithmetic": "5", "math": "5", "classification": "5",
    "qa": ["a", "five"], "trivia": ["a", "five"], "piecewise_continuity": asdict(EXAMPLE),
}  # fmt: skip
MOST = 12.0


def cpu_s(reward: str, text: str) -> float:
    """Return the CPU time of one score."""
    start = time.process_time()
    REWARDS.get(reward)(
        data_source=reward, solution_str=text, ground_truth=REFERENCES[reward], extra_info=None
    )
    return time.process_time() - start


def measure(reward: str, length: int, every: int) -> Iterator[tuple[float, float, str]]:
    """Yield ratio, seconds at ten times the length, and the text's beginning."""
    pairs = zip(repeated(length), repeated(10 * length), strict=True)
    for short, long in itertools.islice(pairs, None, None, every):
        large = cpu_s(reward, long)
        if large >= 0.05:
            # The faster of three is the least disturbed.
            small = min(cpu_s(reward, short) for _ in range(3))
            ratio = large / small
            if ratio > MOST:
                ratio = min(large, *(cpu_s(reward, long) for _ in range(2))) / small
            yield ratio, large, repr(long[:30])


def main() -> int:
    """Measure, print the figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=100_000)
    parser.add_argument("--reward", choices=list(REFERENCES), action="append")
    parser.add_argument("--every", type=int, default=1, help="measure one text in so many")
    args = parser.parse_args()

    worst = 0.0
    print("reward                  worst ratio   slowest")
    for reward in args.reward or REFERENCES:
        found = list(measure(reward, args.length, args.every)) or [(0.0, 0.0, "none takes 50 ms")]
        ratio, _, text = max(found)
        seconds, slowest = max((seconds, text) for _, seconds, text in found)
        print(f"{reward:22} {ratio:8.1f} {text}   {seconds:.2f} s {slowest}", flush=True)
        worst = max(worst, ratio)
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
