"""What a checkpoint costs each data-parallel rank: bytes written, memory, time per tensor.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py
    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --against OTHER_CHECKOUT --dp 1 2 4

Real workers of one actor, one process per rank, save a checkpoint of weights and Adam's moments and
read it back. Three models: `wide` has few large tensors (42 million parameters), for memory; `deep`
has many small ones, and `mixture` many experts in few layers, for time. Every rank says

    written    bytes of its files, per parameter of its model-parallel shard
    save, load growth of the resident set at its peak over what training holds, per parameter of
               the shard
    begin, end milliseconds until training goes on and from there until the checkpoint is whole,
               and to load it, per tensor: a parameter's weight, master and two moments are four

and the table has the least and the largest of all ranks for bytes, the largest for the rest. Times
are medians of three saves and loads. With `--against` the same is done by another state of the
package (its folder), turn about, and the ratios are printed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SIZES: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 1024, "num_hidden_layers": 2, "vocab_size": 8192},
    "deep": {"hidden_size": 32, "num_hidden_layers": 64, "vocab_size": 64},
    "mixture": {
        **{"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64},
        **{"num_experts": 128, "moe_intermediate_size": 16},
    },
}
MEASURED_FOR_TIME = ("deep", "mixture")
NUM_TURNS = 3
LIMIT_PEAK, LIMIT_SPREAD, LIMIT_TIME = 20.0, 1.05, 0.25


def make_model(folder: Path, sizes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    torch.manual_seed(0)
    hidden = sizes["hidden_size"]
    family: Any = Qwen3MoeConfig if "num_experts" in sizes else Qwen3Config
    config = family(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        intermediate_size=3 * hidden,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@contextmanager
def peak_over_now() -> Iterator[Callable[[], int]]:
    """Yield a function that returns how many bytes the resident set has grown at its peak."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now

    def growth() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (peak,) = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")]
        return peak - before

    yield growth


def run_rank(rank: int, world_size: int, work: Path, dtype: str) -> dict[str, Any]:
    """Save and load as one rank and return what it took."""
    import torch
    import torch.distributed as dist

    from mcore_rl.cluster.placement import colocated
    from mcore_rl.config.run import train_layout
    from mcore_rl.megatron.checkpoint import begin_save, load_checkpoint
    from mcore_rl.megatron.config import MegatronConfig, OptimConfig
    from mcore_rl.types import Offloads
    from mcore_rl.workers.spec import ActorSpec, WorkerSpec
    from mcore_rl.workers.worker import Worker

    dist.init_process_group(
        "gloo",
        init_method=f"file://{work}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=10),
    )
    spec = ActorSpec(
        model_path=str(work / "model"),
        megatron=MegatronConfig(dtype=dtype),
        optim=OptimConfig(lr=1e-3),
        grad_clip=1.0,
        total_steps=10,
        temperature=1.0,
        with_reference=False,
        lora=None,
    )
    placement = colocated(train_layout(spec.megatron, world_size), world_size, engine_size=None)
    actor: Any = Worker(
        WorkerSpec(placement=placement, actor=spec, engine=None, critic=None, offloads=Offloads()),
        torch.device("cpu"),
    ).actor
    for one in actor.optimizer.inner.chained_optimizers:
        one.init_state_fn(one.optimizer, one.config)
    params = [param for chunk in actor.chunks for param in chunk.parameters()]
    found: dict[str, Any] = {
        "parameters": sum(map(torch.numel, params)),
        "tensors": 4 * len(params),
    }
    parts = actor.trained, actor.optimizer, actor.parallel
    begin_s, end_s, load_s = [], [], []
    for turn in range(NUM_TURNS):
        folder = work / f"turn{turn}"
        folder.mkdir(exist_ok=True)
        dist.barrier()
        with peak_over_now() as growth:
            start = time.perf_counter()
            pending = begin_save(folder, *parts)
            begin_s.append(time.perf_counter() - start)
            state = pending.state(wait=True)
            assert state.is_done and not state.problem, state
            dist.barrier()
            pending.finish()
            end_s.append(time.perf_counter() - start - begin_s[-1])
            found["save"] = max(growth(), found.get("save", 0))
        del pending
        files = folder.glob(f"__{rank}_*.distcp")
        found["written"] = sum(file.stat().st_size for file in files)
        dist.barrier()
        with peak_over_now() as growth:
            start = time.perf_counter()
            load_checkpoint(folder, *parts)
            load_s.append(time.perf_counter() - start)
            found["load"] = max(growth(), found.get("load", 0))
    found |= {
        name: statistics.median(seconds)
        for name, seconds in (("begin_s", begin_s), ("end_s", end_s), ("load_s", load_s))
    }
    dist.barrier()
    return found


def measure(tree: Path, model: str, dp: int, dtype: str) -> dict[str, float]:
    """Return the figures of one line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", SIZES[model])
        env = os.environ | {"PYTHONPATH": str(tree), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        ranks = [
            subprocess.Popen(
                [
                    *(sys.executable, str(HERE), "--rank", str(rank), "--dp", str(dp)),
                    *("--work", folder, "--dtype", dtype),
                ],
                env=env | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(dp)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit("a rank failed; see above")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    written = [of_rank["written"] / of_rank["parameters"] for of_rank in found]
    return {
        "least": min(written),
        "most": max(written),
        **{
            name: max(of_rank[name] / of_rank["parameters"] for of_rank in found)
            for name in ("save", "load")
        },
        **{
            f"{name}_ms": max(1e3 * of_rank[f"{name}_s"] / of_rank["tensors"] for of_rank in found)
            for name in ("begin", "end", "load")
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--against", type=Path, help="folder of another state of the repository")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(run_rank(args.rank, args.dp[0], args.work, args.dtype)))
        return 0
    trees = {"before": args.against and args.against.resolve(), "now": HERE.parents[1]}
    print(
        "                       bytes per parameter of the shard         ms per tensor\n"
        "model    dp  state     written (least, most)   save    load     begin     end    load"
    )
    problems = []
    for model in args.models:
        for dp in args.dp:
            lines = {}
            for state, tree in trees.items():
                if tree is None:
                    continue
                lines[state] = now = measure(tree, model, dp, args.dtype)
                print(
                    f"{model:7}{dp:5}  {state:8}  {now['least']:12.2f} {now['most']:8.2f}"
                    f"{now['save']:8.1f}{now['load']:8.1f}"
                    f"{now['begin_ms']:10.3f}{now['end_ms']:8.3f}{now['load_ms']:8.3f}",
                    flush=True,
                )
            now = lines["now"]
            if model == "wide":
                if max(now["save"], now["load"]) > LIMIT_PEAK:
                    problems.append(f"{model} dp {dp}: a peak of more than {LIMIT_PEAK} bytes")
                if now["most"] > LIMIT_SPREAD * now["least"]:
                    problems.append(f"{model} dp {dp}: bytes are not spread evenly")
            if "before" in lines:
                before = lines["before"]
                ratios = [now[f"{name}_ms"] / before[f"{name}_ms"] for name in ("begin", "load")]
                ends = now["end_ms"] / before["end_ms"]
                print(f"{'':62}ratio {ratios[0]:6.2f}{ends:8.2f}{ratios[1]:8.2f}")
                if model in MEASURED_FOR_TIME and max(ratios) > LIMIT_TIME:
                    problems.append(f"{model} dp {dp}: times {ratios}, wanted {LIMIT_TIME}")
    for problem in problems:
        print(f"missed: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
