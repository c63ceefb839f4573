"""What a step costs the controller, per token: samples, metrics, advantages, plans, sending.

    OMP_NUM_THREADS=1 python benchmarks/controller.py
    OMP_NUM_THREADS=1 python benchmarks/controller.py --tokens 1000000 --against OTHER_CHECKOUT

The controller is the package's, with a world of 64 as TP4 PP2 DP8: the loop's functions, the
trainer, and the channel with its 64 connections over sockets of this machine, not encrypted. The
workers are a few processes without a model that take what comes and answer as one would
(`controller_receivers.py`). Two passes of log-probabilities (policy and reference) and the updates
of a step. That what arrives is what was sent, once, is checked.

Columns are nanoseconds of CPU time of the controller's process, with its threads, a token of a step
(prompt and response):

    samples      requests, and samples of results that are there
    metrics      rewards into the samples, rollout metrics
    logprobs     both passes: plan, shares, sending, what comes back
    advantages   GRPO's
    updates      four minibatches: plan, shares, sending, metrics

`peak B` is the growth of the resident set in bytes a token, beside the samples, which are made
before. `wire B` is counted by the receivers, in bytes a token for all of them together: of a pass
there and back, and of the updates of a step. Exit code 1 if a limit is missed.

With `--routes` the samples have the routes of a mixture with 48 layers of 8 experts a token (R3):
384 bytes a token that lie in the workers. `routes` is how often the workers are told to pass them
on, on average: at most once. The other limits stay as they are.

With `--against` the same is done by another state of the package (its folder); by one without a
channel as `controller_before.py` says.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TP, PP, DP = 4, 2, 8
MODEL_RANKS = TP * PP
GROUP_SIZE, NUM_MINIBATCHES, MAX_TOKENS = 8, 4, 20_480
VOCABULARY = 150_000
LONGEST = 8192
"""Of the responses."""
SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "max_tokens": LONGEST,
    "seed": "0:0",
}
STAGES = ("samples", "metrics", "logprobs", "advantages", "updates")
LIMIT_NS, LIMIT_WIRE, LIMIT_PEAK, LIMIT_ROUTES = 150.0, 30.0, 64.0, 1.0


class Ledger:
    """CPU time of the stages, and how much the resident set grows."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._resident = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def begin_memory(self) -> None:
        """Measure growth from here on."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self._resident = pages * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now

    def figures(self, tokens: int) -> dict[str, Any]:
        """Return nanoseconds of the stages and bytes of growth, a token."""
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")]
        return {
            "tokens": tokens,
            "ns": {name: 1e9 * seconds / tokens for name, seconds in self.seconds.items()},
            "peak": (peak - self._resident) / tokens,
        }


def make_prompts(num_tokens: int) -> list[np.ndarray]:
    """Return the ids of as many prompts as make about `num_tokens` with their responses; their
    number is a multiple of the minibatches'."""
    source = np.random.default_rng(0)
    num_prompts = round(num_tokens / GROUP_SIZE / 1_268)
    num_prompts = max(1, round(num_prompts / NUM_MINIBATCHES)) * NUM_MINIBATCHES
    lengths = source.integers(50, 400, num_prompts).tolist()
    return [source.integers(VOCABULARY, size=length, dtype=np.int32) for length in lengths]


def make_responses(num_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and log-probabilities of the responses: most are short, some reach the limit."""
    source = np.random.default_rng(1)
    num_responses = len(make_prompts(num_tokens)) * GROUP_SIZE
    lengths = np.minimum(50 + source.lognormal(6.5, 0.9, num_responses).astype(int), LONGEST)
    for length in lengths.tolist():
        ids = source.integers(VOCABULARY, size=length, dtype=np.int32)
        yield ids, -source.random(length, dtype=np.float32)


def make_rewards(num_samples: int) -> list[float]:
    return np.random.default_rng(2).integers(2, size=num_samples).astype(float).tolist()


def run(num_tokens: int, num_receivers: int, with_routes: bool) -> dict[str, Any]:
    """Do one step with receivers at the other ends of the sockets and return what it took."""
    import torch  # noqa: F401  # the package imports it where it is needed first: in a stage
    from controller_receivers import Receiver, receiving

    from mcore_rl.algorithms.advantages import assign_advantages
    from mcore_rl.algorithms.objective import resolve_objective
    from mcore_rl.algorithms.objectives import PolicyObjective
    from mcore_rl.cluster.cluster import Cluster
    from mcore_rl.cluster.group import call_all
    from mcore_rl.cluster.placement import colocated
    from mcore_rl.config.run import ActorConfig, RunConfig
    from mcore_rl.data.packing import TokenBudget
    from mcore_rl.loop.generate import answered_groups, ask_for_groups, rollout_metrics
    from mcore_rl.loop.step import update, with_logprobs
    from mcore_rl.metrics import merge, to_floats
    from mcore_rl.rewards.pool import Outcome
    from mcore_rl.rewards.score import reward_metrics, with_outcomes
    from mcore_rl.rollout.base import GenerationResult
    from mcore_rl.types import Layout, Prompt, VersionSpan

    prompts = [
        Prompt(uid=f"p:{i}", token_ids=ids, text="", data_source="s", ground_truth="")
        for i, ids in enumerate(make_prompts(num_tokens))
    ]
    results = [
        GenerationResult(
            token_ids=ids,
            logprobs=numbers,
            finish_reason="stop",
            versions=[VersionSpan(0, 0, len(ids))],
        )
        for ids, numbers in make_responses(num_tokens)
    ]
    outcomes = [Outcome(score=reward) for reward in make_rewards(len(results))]
    placement = colocated(Layout(tp=TP, pp=PP, dp=DP), MODEL_RANKS, engine_size=TP)
    if with_routes:
        results = with_routes_at(results, placement)
    answers = iter(results)
    answered = [[next(answers) for _ in range(GROUP_SIZE)] for _ in prompts]
    engines: Any = SimpleNamespace(engines=SimpleNamespace(generate=lambda *_, **__: answered))
    actor = ActorConfig(ppo_mini_batch_size=len(prompts) // NUM_MINIBATCHES, use_kl_loss=True)
    cfg = RunConfig(actor=actor)
    objective = PolicyObjective(resolve_objective(actor, LONGEST), log_entropy=True)
    ledger = Ledger()
    with receiving(placement, num_receivers) as workers:
        cluster = Cluster.of(workers, placement, TokenBudget(max_tokens=MAX_TOKENS))
        gc.collect()
        gc.freeze()
        with ledger.stage("samples"):
            asked = ask_for_groups(engines, prompts, GROUP_SIZE, **SAMPLING)
            groups = answered_groups(engines, asked)
        results.clear()
        answered.clear()
        ledger.begin_memory()
        with ledger.stage("metrics"):
            groups = with_outcomes(groups, outcomes)
            merge([rollout_metrics(groups, 0), reward_metrics(groups)])
        with ledger.stage("logprobs"):
            groups = with_logprobs(cfg, cluster, objective, groups)
        with ledger.stage("advantages"):
            groups, _ = assign_advantages(groups, cfg.algorithm)
        with ledger.stage("updates"):
            to_floats(update(cfg, cluster, objective, groups))
        samples = [sample for group in groups for sample in group.samples]
        tokens = sum(len(sample.token_ids) for sample in samples)
        figures = ledger.figures(tokens)
        counts = call_all(workers, Receiver.counts)
    check_arrival(samples, counts, placement)
    figures["wire"] = wire_bytes(counts, tokens)
    if with_routes:
        taken = sum(of_rank["exchange"].tokens for of_rank in counts if "exchange" in of_rank)
        figures["routes"] = taken / (tokens - len(samples))  # a last token has none
    return figures


def with_routes_at(results: list[Any], placement: Any) -> list[Any]:
    """Return the results with routes that lie in the engines, dealt as the fleet deals requests."""
    from dataclasses import replace

    from mcore_rl.types import RoutesAt

    ranks = [of_engine[0] for of_engine in placement.engine_ranks]
    return [
        replace(result, routed_experts=RoutesAt(rank=ranks[i % len(ranks)], key=i // len(ranks)))
        for i, result in enumerate(results)
    ]


def check_arrival(samples: Sequence[Any], counts: Sequence[dict[str, Any]], placement: Any) -> None:
    """Raise unless every token arrived once with its numbers, at the first rank of a share, and
    the numbers of the passes came back to their samples."""
    from controller_receivers import checksum, numbers_of

    tokens = sum(len(sample.token_ids) for sample in samples)
    ids = sum(float(sample.token_ids.sum(dtype=np.int64)) for sample in samples)
    of_updates = sum(map(checksum, samples))
    wanted = {"logprobs": ids, "ref_logprobs": ids, "update": of_updates}
    leaders = {ranks[0] for ranks in placement.share_ranks}
    for method, total in wanted.items():
        of_method = [of_rank[method] for of_rank in counts]
        assert {rank for rank, found in enumerate(of_method) if found.tokens} == leaders, method
        assert sum(found.tokens for found in of_method) == tokens, method
        # Sums of the advantages in another order.
        assert abs(sum(found.checksum for found in of_method) - total) < 1e-6 * tokens, method
    for sample in samples:
        for numbers in (sample.old_logprobs, sample.ref_logprobs):
            assert np.array_equal(numbers, numbers_of(sample.token_ids))


def wire_bytes(counts: Sequence[dict[str, Any]], tokens: int) -> dict[str, float]:
    """Return the bytes a token of a pass, there and back, and of the updates."""
    by_method = {
        name: sum(of_rank[name].sent + of_rank[name].answered for of_rank in counts) / tokens
        for name in ("logprobs", "ref_logprobs", "update")
    }
    passes = (by_method["logprobs"] + by_method["ref_logprobs"]) / 2
    return {"logprobs": passes, "updates": by_method["update"]}


def run_child(tokens: int, receivers: int, with_routes: bool) -> None:
    """Print the figures of the state of the package that this process finds."""
    if importlib.util.find_spec("mcore_rl.launch.channel"):
        found = run(tokens, receivers, with_routes)
    else:
        import controller_before

        found = controller_before.run(tokens)
    sys.stdout.write(json.dumps(found))


def measure(tree: Path, tokens: int, receivers: int, with_routes: bool) -> dict[str, Any]:
    """Return the figures of a state of the package, of a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    command += ["--tokens", str(tokens), "--receivers", str(receivers)]
    command += ["--routes"] * with_routes
    environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def missed(found: dict[str, Any]) -> list[str]:
    """Return what goes beyond its limit."""
    limits = {
        "ns": (sum(found["ns"].values()), LIMIT_NS),
        "peak B": (found["peak"], LIMIT_PEAK),
        "wire B of a pass": (found["wire"]["logprobs"], LIMIT_WIRE),
        "wire B of the updates": (found["wire"]["updates"], LIMIT_WIRE),
        "times a route is passed on": (found.get("routes", 0.0), LIMIT_ROUTES),
    }
    return [
        f"{name} {value:.1f} > {most:g}" for name, (value, most) in limits.items() if value > most
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000_000, 16_000_000])
    parser.add_argument("--receivers", type=int, default=4, help="processes, 8 at most")
    parser.add_argument("--routes", action="store_true", help="samples have routes to be replayed")
    parser.add_argument("--against", type=Path, help="folder of another state of the repository")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.tokens[0], args.receivers, args.routes)
        return 0
    trees = {"before": args.against, "now": Path(__file__).parents[1]}
    print("state      tokens  " + "".join(f"{name:>11}" for name in STAGES), end="")
    print(f"  all ns ({LIMIT_NS:g})  peak B ({LIMIT_PEAK:g})  wire B ({LIMIT_WIRE:g})")
    problems = []
    for tokens in args.tokens:
        for name, tree in trees.items():
            if tree is None:
                continue
            found = measure(tree, tokens, args.receivers, args.routes)
            print(
                f"{name:6}  {found['tokens']:9}  "
                + "".join(f"{found['ns'][stage]:11.1f}" for stage in STAGES)
                + f"  {sum(found['ns'].values()):12.1f}  {found['peak']:11.1f}"
                + f"   {found['wire']['logprobs']:5.1f} {found['wire']['updates']:5.1f}"
                + (f"   routes {found['routes']:.2f}" if "routes" in found else ""),
                flush=True,
            )
            if name == "now":
                problems += [f"{found['tokens']} tokens: {problem}" for problem in missed(found)]
    for problem in problems:
        print(f"missed: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
