"""What the controller does with the samples of a step before it sends them, per token.

    OMP_NUM_THREADS=1 python benchmarks/controller.py
    OMP_NUM_THREADS=1 python benchmarks/controller.py --tokens 1000000 --against OTHER_CHECKOUT

Results of engines become samples, samples get advantages, metrics are made, the minibatches are
planned and the share of every data-parallel rank is pickled: two passes of log-probabilities and
the updates of a step, for a layout of TP4 PP2 DP8 on 64 devices. Nothing is sent. With `--against`
the same is done by another state of the package (its folder), in processes of its own.

Columns are nanoseconds of CPU time a token of a step (prompt and response). `peak B` is the growth
of the resident set in bytes a token, beside the samples, which are made before. `wire B` is what
all ranks are sent, in bytes a token: each share once, or before, once for every rank of a model.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DP, MODEL_RANKS = 8, 8  # TP4 PP2
GROUP_SIZE, NUM_MINIBATCHES, MAX_TOKENS = 8, 4, 20_480
VOCABULARY = 150_000
STAGES = ("samples", "metrics", "logprobs", "advantages", "updates")


class Ledger:
    """CPU time of the stages, and the largest resident set since it was last asked for."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def make_results(num_tokens: int) -> tuple[list[Any], list[list[Any]]]:
    """Return prompts and the results of an engine for each, about `num_tokens` in all."""
    import numpy as np

    from mcore_rl.rollout.base import GenerationResult
    from mcore_rl.types import Prompt

    source = np.random.default_rng(0)
    as_arrays = hasattr(Prompt, "__post_init__")  # an older state takes lists
    plain = (lambda x: x) if as_arrays else (lambda x: x.tolist())
    prompts, results, total = [], [], 0
    while total < num_tokens:
        ids = source.integers(VOCABULARY, size=int(source.integers(50, 400)), dtype=np.int32)
        prompts.append(
            Prompt(
                uid=f"p:{len(prompts)}",
                token_ids=plain(ids),
                text="",
                data_source="s",
                ground_truth="",
            )
        )
        # Most responses are short and some reach the limit.
        lengths = np.minimum(50 + source.lognormal(6.5, 0.9, GROUP_SIZE).astype(int), 8192)
        of_prompt = []
        for length in lengths.tolist():
            of_prompt.append(
                GenerationResult(
                    token_ids=plain(source.integers(VOCABULARY, size=length, dtype=np.int32)),
                    logprobs=plain(-source.random(length, dtype=np.float32)),
                    finish_reason="length" if length == 8192 else "stop",
                    weight_version=0,
                )
            )
            total += length + len(ids)
        results.append(of_prompt)
    return prompts, results


class Tokenizer:
    """Decodes to nothing: decoding is not measured here."""

    def decode(self, token_ids: Any, skip_special_tokens: bool) -> str:
        return ""


def sent(objects: list[Any]) -> int:
    """Return the bytes of what would be sent, and let it go."""
    total = 0
    for item in objects:
        buffers: list[pickle.PickleBuffer] = []
        total += len(pickle.dumps(item, protocol=5, buffer_callback=buffers.append))
        total += sum(buffer.raw().nbytes for buffer in buffers)
    return total


def shares_of(sequences: list[Any], plan: Any, reads: tuple[str, ...] | None) -> Iterator[Any]:
    """Yield what each data-parallel rank is sent; None reads all."""
    try:
        from mcore_rl.types import Share
    except ImportError:  # an older state sends the micro-batches as they are, to every rank
        for of_rank in plan.micro_batches:
            for _ in range(MODEL_RANKS):
                yield of_rank
    else:
        for of_rank in plan.micro_batches:
            yield Share.of(sequences, of_rank, *(() if reads is None else (reads,)))


def run(num_tokens: int) -> dict[str, Any]:
    """Do one step and return what it took."""
    import numpy as np

    from mcore_rl.algorithms.advantages import AlgorithmConfig, assign_advantages
    from mcore_rl.data.packing import (
        TokenBudget,
        packing_metrics,
        plan_minibatch,
        split_minibatches,
    )
    from mcore_rl.loop import generate
    from mcore_rl.loop.generate import rollout_metrics
    from mcore_rl.types import SampleGroup, with_sample_fields

    ledger, cut = Ledger(), TokenBudget(max_tokens=MAX_TOKENS)
    prompts, results = make_results(num_tokens)
    with_text = "tokenizer" in inspect.signature(generate._sample).parameters
    rest = (Tokenizer(),) if with_text else ()
    gc.collect()
    gc.freeze()
    with ledger.stage("samples"):
        groups = [
            SampleGroup(
                prompt=prompt,
                samples=[
                    generate._sample(prompt, index, result, *rest)
                    for index, result in enumerate(of_prompt)
                ],
            )
            for prompt, of_prompt in zip(prompts, results, strict=True)
        ]
    del results
    gc.collect()
    samples = [sample for group in groups for sample in group.samples]
    tokens = sum(len(sample.token_ids) for sample in samples)
    rewards = np.random.default_rng(1).integers(2, size=len(samples)).astype(float).tolist()
    groups = with_sample_fields(groups, reward=rewards)
    # What comes back from the two passes; the old state unpickles it as lists.
    numbers = [sample.rollout_logprobs for sample in samples]
    del samples
    resident = resident_bytes()
    reset_peak()
    with ledger.stage("metrics"):
        rollout_metrics(groups, 0)
    wire = {"logprobs": 0, "updates": 0}
    with ledger.stage("logprobs"):
        sequences = [sample.to_sequence() for group in groups for sample in group.samples]
    for name in ("old_logprobs", "ref_logprobs"):
        with ledger.stage("logprobs"):
            plan = plan_minibatch(sequences, DP, cut)
            for share in shares_of(sequences, plan, ()):
                wire["logprobs"] += sent([share])
            groups = with_sample_fields(groups, **{name: numbers})
    with ledger.stage("advantages"):
        groups, _ = assign_advantages(groups, AlgorithmConfig())
    size = -(-len(groups) // NUM_MINIBATCHES)
    groups += groups[: size * NUM_MINIBATCHES - len(groups)]
    for minibatch in split_minibatches(groups, size):
        with ledger.stage("updates"):
            sequences = [sample.to_sequence() for group in minibatch for sample in group.samples]
            plan = plan_minibatch(sequences, DP, cut)
            packing_metrics(plan, cut)
            for share in shares_of(sequences, plan, None):
                wire["updates"] += sent([share])
    return {
        "tokens": tokens,
        "ns": {name: 1e9 * seconds / tokens for name, seconds in ledger.seconds.items()},
        "peak": (peak_bytes() - resident) / tokens,
        "wire": {"logprobs": wire["logprobs"] / 2 / tokens, "updates": wire["updates"] / tokens},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--against", type=Path, help="folder of another state of the repository")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.tokens[0])))
        return
    here = Path(__file__).parents[1]
    print("state   tokens     " + "".join(f"{name:>12}" for name in STAGES) + "   all ns", end="")
    print("   peak B   wire B of a pass, of the updates")
    for tokens in args.tokens:
        for name, tree in (("before", args.against), ("now", here)):
            if tree is None:
                continue
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--child",
                "--tokens",
                str(tokens),
            ]
            environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout)
            print(
                f"{name:6}  {found['tokens']:9}  "
                + "".join(f"{found['ns'][stage]:12.1f}" for stage in STAGES)
                + f"  {sum(found['ns'].values()):7.1f}  {found['peak']:7.1f}"
                + f"   {found['wire']['logprobs']:5.1f}  {found['wire']['updates']:5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
