"""A weight sync into vLLM beside a plain copy of the same bytes.

    OMP_NUM_THREADS=1 python benchmarks/weight_sync.py --kind dense
    OMP_NUM_THREADS=1 python benchmarks/weight_sync.py --kind moe --clock cpu

Models of 0.7 GB in float32: a dense one, and a mixture of 32 experts in 10 layers. Megatron's
parameters are exported, sent by each transport and loaded by a real vLLM engine; both ends are in
this process and take turns, so that a time is that of the work at both; only digests are taken in
a thread beside it, which `taskset --cpu-list 0` in front sends back to the same core. The plain
copy is `Tensor.copy_` of every tensor into memory that is there, in the same run, turn about. A
part's time excludes what it calls: `packing` is vLLM's own processing of loaded weights for its CPU
kernels, `load` the rest of loading, `rest` includes the wait for digests at the sender. `floor` is
loading and packing alone, given tensors that lie in memory, without export, digests and transport:
no sync on CPU is faster.

Figures are medians over the repeats; `rate` is the copy's time over the sync's. `extra` is how much
more memory this process has at most in a sync than before, the median of three that are not timed:
the proportional set, read every few milliseconds, in which what both ends share counts once.

Exit code 1 when a line of the contract fails (`LEAST_RATE`, `MOST_BUCKETS`).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEAST_RATE = {
    ("dense", "direct"): 0.4,
    ("dense", "shared_memory"): 0.3,
    ("moe", "direct"): 0.15,
}
MOST_BUCKETS = 2
"""Extra memory at most, in buckets."""
PARTS = ("export", "transfer", "load", "packing", "rest")


class Timer:
    """Times parts of the work that call each other."""

    def __init__(self, clock: str) -> None:
        self._now = CLOCKS[clock]
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running = ["rest"]
        self._since = self._now()

    def _switch(self) -> None:
        now = self._now()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def iterated(self, name: str, iterable: Any) -> Iterator[Any]:
        iterator = iter(iterable)
        while True:
            with self.part(name):
                value = next(iterator, self)
            if value is self:
                return
            yield value

    def take(self) -> dict[str, float]:
        self._switch()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def model_config(kind: str) -> Any:
    from transformers import Qwen3Config, Qwen3MoeConfig

    shared = {"vocab_size": 8192, "head_dim": 64, "tie_word_embeddings": False}
    if kind == "dense":
        return Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=8,
            architectures=["Qwen3ForCausalLM"],
            **shared,
        )
    return Qwen3MoeConfig(
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=384,
        num_hidden_layers=10,
        num_experts=32,
        num_experts_per_tok=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        architectures=["Qwen3MoeForCausalLM"],
        **shared,
    )


def make_exporter(folder: str) -> Any:
    import torch
    import torch.distributed as dist

    from mcore_rl.megatron.parallel import Parallel
    from mcore_rl.models.mappings import shard_shape
    from mcore_rl.models.spec import load_hf_config, model_family
    from mcore_rl.types import Layout
    from mcore_rl.weight_sync.export import WeightExporter

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names = ["tp", "pp", "cp", "dp", "dp_cp", "ep", "etp", "tp_ep", "expert_dp", "share"]
    groups: Any = dict.fromkeys(names, dist.group.WORLD)
    parallel = Parallel(layout=Layout(dp=1), rank=0, host=None, **groups)
    config = load_hf_config(folder)
    entries = model_family(config).entries(config)
    source = torch.Generator().manual_seed(0)
    params = {
        entry.megatron_name: torch.randn(shard_shape(entry, 0, 1), generator=source) * 0.02
        for entry in entries
    }
    return WeightExporter(params, entries, parallel)


def weights_of(engine: Any) -> Any:
    """Return the receiving end in vLLM's worker."""
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.weight_transfer_engine


def time_vllm(weights: Any, timer: Timer) -> None:
    """Have the engine's loading and packing timed."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    weights.intake._load_into = timer.timed("load", weights.intake._load_into)
    for name in ("start_weight_update", "finish_weight_update"):
        setattr(weights, name, timer.timed("load", getattr(weights, name)))
    for module in weights.model.modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            packing = method.process_weights_after_loading
            method.process_weights_after_loading = timer.timed("packing", packing)


@contextlib.contextmanager
def peak_of(found: list[int]) -> Iterator[None]:
    """Append by how many bytes this process's memory grows at most."""

    def held() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))

    before, over = held(), threading.Event()

    def watch() -> int:
        highest = before
        while not over.wait(0.002):
            highest = max(highest, held())
        return highest

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            over.set()
    found.append(watching.result() - before)


def measure(args: argparse.Namespace, transport: str, folder: str, exporter: Any) -> bool:
    """Print the figures of a transport; return whether they hold the contract."""
    import torch
    from vllm.config import set_current_vllm_config

    from mcore_rl.rollout import load_engine
    from mcore_rl.rollout.base import EngineSpec, RolloutConfig
    from mcore_rl.weight_sync.base import Link
    from mcore_rl.weight_sync.digest import Manifest
    from mcore_rl.weight_sync.sync import sync_one

    timer = Timer(args.clock)
    add = Manifest.add
    beside = Timer(args.clock)
    Manifest.add = beside.timed("digest", add)  # type: ignore[method-assign]
    link = Link(transport=transport, run_folder=folder, engine=0, engine_rank=0)
    rollout = RolloutConfig(kv_cache_memory_bytes=32 << 20)
    spec = EngineSpec(
        model_path=folder,
        dtype="float32",
        max_model_len=64,
        stop_token_ids=[],
        config=rollout,
        run_folder=folder,
    )
    sender, engine = link.open_sender(), load_engine(spec, link)
    torch.set_num_threads(args.threads)
    weights = weights_of(engine)
    time_vllm(weights, timer)
    sender.send = timer.timed("transfer", sender.send)
    bucket_bytes = args.bucket_mib << 20
    sizes = [sum(x.nbytes for _, x in bucket) for bucket in exporter.buckets(bucket_bytes)]
    source = list(exporter.params.values())
    target = [torch.zeros_like(tensor) for tensor in source]

    def sync(version: int) -> None:
        buckets = timer.iterated("export", exporter.buckets(bucket_bytes))
        sync_one(buckets, sender, engine, version)

    exported = list(exporter.buckets(bucket_bytes))  # of one process: views

    def load_alone() -> None:
        with set_current_vllm_config(weights.vllm_config):
            weights.start_weight_update()
            for bucket in exported:
                weights.intake._load_into(bucket)
            weights._close_layers()

    sync(0)  # vLLM's first load
    copies: list[float] = []
    syncs: list[dict[str, float]] = []
    digests: list[float] = []
    floors: list[float] = []
    extra: list[int] = []
    for version in range(1, 1 + args.repeats):
        begin = CLOCKS[args.clock]()
        for into, tensor in zip(target, source, strict=True):
            into.copy_(tensor)
        copies.append(CLOCKS[args.clock]() - begin)
        begin = CLOCKS[args.clock]()
        load_alone()
        floors.append(CLOCKS[args.clock]() - begin)
        timer.take()
        beside.take()
        sync(version)
        syncs.append(timer.take())
        digests.append(beside.take().get("digest", 0.0))
    for version in range(1 + args.repeats, 4 + args.repeats):
        with peak_of(extra):
            sync(version)
    engine.close()
    sender.close()
    Manifest.add = add

    copy, floor = statistics.median(copies), statistics.median(floors)
    total = statistics.median(sum(each.values()) for each in syncs)
    parts = {part: statistics.median(each.get(part, 0.0) for each in syncs) for part in PARTS}
    rate, least = copy / total, LEAST_RATE.get((args.kind, transport), 0.0)
    buckets = statistics.median(extra) / max(sizes)
    shown = "  ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
    shown += f"; beside: digest {statistics.median(digests):.3f}"
    print(
        f"{args.kind:5} {transport:13} {sum(sizes) / 1e9:.2f} GB  copy {copy:.3f}  sync {total:.3f}"
        f"  [{shown}]  rate {rate:.2f} (at least {least})  floor {floor:.3f}, "
        f"rate {copy / floor:.2f}  beyond it {copy / (total - floor):.2f}"
        f"  extra {buckets:.2f} of a bucket of {max(sizes) >> 20} MiB",
        flush=True,
    )
    return rate >= least and buckets <= MOST_BUCKETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
    parser.add_argument("--transports", default="direct,shared_memory,gloo,disk")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_config(args.kind).save_pretrained(folder)
        exporter = make_exporter(folder)
        holds = [
            measure(args, transport, folder, exporter) for transport in args.transports.split(",")
        ]
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
