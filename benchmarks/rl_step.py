"""Whole steps of reinforcement learning beside TRL's GRPOTrainer, and where their time goes.

    python benchmarks/rl_step.py --trl-python /tmp/trl/bin/python
    python benchmarks/rl_step.py --trl-python /tmp/trl/bin/python --shapes mixture --json out.json
    python benchmarks/rl_step.py --against OTHER_CHECKOUT

TRL has an environment of its own, with the versions of the lock:

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install --no-deps torch==2.13.0          # the CPU build
    /tmp/trl/bin/pip install -c requirements/cpu.lock trl==1.16.0

Both sides do the same work in float32: the same random model, prompts and reward; responses of one
length (the model never samples its end token); PPO's clipped loss over all tokens; one update of
all samples a step; clipping and AdamW. Each runs as a user runs it: ours is the training command on
vLLM engines, theirs generates with transformers. Turn about, `--rounds` runs of each, the same
number of threads in all: ours two processes of one thread, or one of two; theirs one of two. A
figure is the median over the steps of all rounds without the first few of each run.

    quickstart   256 samples of 3 tokens, the model of the quickstart
    mixture      64 samples of 110 tokens, hidden 256, 4 layers, 8 experts, top-2

The table below the ratios has the stages of our step (`time/*` of metrics.jsonl); beside `rollout`
stands vLLM alone on the same requests (as many engines and threads), beside `train` the time of the
matrix products of linear layers alone, forward once and backward twice, at the speed of one large
product measured in the same run.

With `--against` there is no TRL: the quickstart's own steps (1024 samples of 3 tokens, two updates)
in this state of the package and in another one (its folder), turn about. Exit code 1 if the ratio
of the medians is above 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAX_RATIO = 1.05
WARM_UP = 3
"""Steps of a run that do not count."""
KV_CACHE_BYTES = 256 << 20
LR = 1e-6
STAGES = ("rollout", "reward", "old_logprobs", "train", "weight_sync")
PRODUCT = (2048, 1024, 2048)

REWARD = '''"""Digits of a response, as a share."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(character.isdigit() for character in solution_str) / 8
'''


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step is made of."""

    prompts: int
    n: int
    """Samples of each."""
    response: int
    """Tokens."""
    minibatch: int
    """Prompts."""
    model: dict[str, int] = field(default_factory=dict)
    """Options of the quickstart's make_model.py."""

    @property
    def num_samples(self) -> int:
        return self.prompts * self.n


MIXTURE = {
    "hidden-size": 256,
    "layers": 4,
    "heads": 8,
    "kv-heads": 4,
    "moe-intermediate-size": 256,
}
SHAPES = {
    "quickstart": Shape(prompts=32, n=8, response=3, minibatch=32),
    "mixture": Shape(prompts=8, n=8, response=110, minibatch=8, model=MIXTURE),
}
QUICKSTART_STEP = Shape(prompts=128, n=8, response=3, minibatch=64)


@dataclass(frozen=True, kw_only=True)
class Files:
    """What both sides read."""

    folder: Path
    model: Path
    data: Path
    reward: Path


def make_files(folder: Path, shape: Shape) -> Files:
    """Make model, data and reward; the model never samples its end token."""
    files = Files(
        folder=folder, model=folder / "model", data=folder / "data", reward=folder / "reward.py"
    )
    examples = HERE.parent / "examples" / "quickstart"
    options = [item for name, value in shape.model.items() for item in (f"--{name}", str(value))]
    for script, arguments in (
        ("make_model.py", ["--out", str(files.model), *options]),
        ("make_data.py", ["--out", str(files.data)]),
    ):
        command = [sys.executable, str(examples / script), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    silence_end_token(files.model)
    files.reward.write_text(REWARD)
    return files


def silence_end_token(folder: Path) -> None:
    """Give the end token's logit so large a negative part that it is never sampled.

    One channel of the hidden state is the same for all tokens, as no layer writes to it; the end
    token alone reads it.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    constant = weights["model.embed_tokens.weight"].std().item()
    weights["model.embed_tokens.weight"][:, 0] = constant
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
    weights["lm_head.weight"][:, 0] = 0.0
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    weights["lm_head.weight"][end] = 0.0
    weights["lm_head.weight"][end, 0] = -1e4
    save_file(weights, file, metadata={"format": "pt"})


def our_run(
    tree: Path, files: Files, shape: Shape, processes: int, threads: int, steps: int
) -> list[dict[str, Any]]:
    """Return the metrics of the steps of a run of the training command, warm-up left out."""
    with tempfile.TemporaryDirectory(dir=files.folder) as run_dir:
        command = [sys.executable, "-m", "mcore_rl.train", "--config-name", "quickstart"]
        command += [
            f"model.path={files.model}",
            f"data.train_files={files.data / 'train.parquet'}",
            f"data.train_batch_size={shape.prompts}",
            f"data.max_response_length={shape.response}",
            "data.shuffle=false",
            "actor.policy_loss.loss_mode=vanilla",
            f"actor.ppo_mini_batch_size={shape.minibatch}",
            f"actor.optim.lr={LR}",
            "actor.optim.lr_warmup_steps=0",
            "actor.optim.lr_decay_style=constant",
            f"actor.megatron.expert_model_parallel_size={processes}",
            f"rollout.n={shape.n}",
            f"rollout.kv_cache_memory_bytes={KV_CACHE_BYTES}",
            f"custom_reward_function.path={files.reward}",
            f"trainer.n_gpus_per_node={processes}",
            f"trainer.total_training_steps={steps}",
            "trainer.save_freq=-1",
            "trainer.test_freq=-1",
            "trainer.export_hf_model=false",
            "trainer.logger=[]",
            f"trainer.default_local_dir={run_dir}",
        ]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        finish(subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True))
        lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    check_lengths(
        [[m["rollout/response_tokens/min"], m["rollout/response_tokens/max"]] for m in found], shape
    )
    return found[WARM_UP:]


def trl_run(python: Path, files: Files, shape: Shape, threads: int, steps: int) -> list[float]:
    """Return the seconds of the steps of a run of TRL, warm-up left out."""
    import pyarrow.parquet as pq

    assert shape.minibatch == shape.prompts
    rows = pq.read_table(files.data / "train.parquet").to_pylist()
    kept = [{"prompt": row["prompt"], "ground_truth": row["ground_truth"]} for row in rows]
    with tempfile.TemporaryDirectory(dir=files.folder) as run_dir:
        given = asdict(shape) | {"model": str(files.model), "reward": str(files.reward)}
        given |= {
            "rows": kept[: steps * shape.prompts],
            "folder": run_dir,
            "steps": steps,
            "lr": LR,
        }
        command = [str(python), str(HERE / "rl_step_trl.py"), json.dumps(given)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, cwd=run_dir, env=environment, capture_output=True, text=True)
    finish(done)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["threads"] == threads
    check_lengths(found["lengths"], shape)
    return found["seconds"][WARM_UP:]


def finish(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")


def check_lengths(found: Sequence[Sequence[float]], shape: Shape) -> None:
    """Raise unless every response has the length of the shape."""
    wrong = [pair for pair in found if set(pair) != {shape.response}]
    assert not wrong, f"responses of {wrong[0]} tokens, not {shape.response}"


@contextmanager
def vllm_alone(files: Files, shape: Shape, engines: int, threads: int) -> Iterator[Any]:
    """Yield a function that answers the requests of a step on engines by themselves, and returns
    the seconds of the slowest."""
    import pyarrow.parquet as pq

    from mcore_rl.data.chat import load_tokenizer

    tokenizer = load_tokenizer(str(files.model))
    rows = pq.read_table(files.data / "train.parquet").to_pylist()[: shape.prompts]
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in rows
        for _ in range(shape.n)
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with ExitStack() as stack:
        processes = []
        for number in range(engines):
            given = {
                "model": str(files.model),
                "prompts": prompts[number::engines],
                "response": shape.response,
                "max_model_len": 32 + shape.response,
                "kv_cache_memory_bytes": KV_CACHE_BYTES,
            }
            command = [sys.executable, str(HERE / "rl_step_vllm.py"), json.dumps(given)]
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            stack.callback(process.kill)
            processes.append(process)

        def answers() -> list[str]:
            lines = [process.stdout.readline().strip() for process in processes]
            if not all(lines):
                sys.exit("vLLM alone has ended; run benchmarks/rl_step_vllm.py to see why")
            return lines

        assert set(answers()) == {"ready"}

        def answer() -> float:
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
            return max(map(float, answers()))

        answer()
        yield answer


def products_s(files: Files, shape: Shape, rate: float) -> float:
    """Return the seconds of the matrix products of an update of all samples at `rate`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(files.model)
    hidden, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    layer = 2 * hidden * config.head_dim * heads  # q and o, k and v
    layer += 3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok
    layer += hidden * config.num_experts
    head = hidden * config.vocab_size
    tokens = shape.num_samples * (PROMPT_TOKENS + shape.response)
    return 3 * tokens * (config.num_hidden_layers * layer + head) / rate


PROMPT_TOKENS = 11
"""Of the quickstart's data."""


def product_rate(threads: int) -> float:
    """Return multiply-adds per second of one large float32 product, the best of eight."""
    program = (
        "import time, torch\n"
        f"m, k, n = {PRODUCT}\n"
        "a, b, times = torch.randn(m, k), torch.randn(k, n), []\n"
        "for _ in range(8):\n"
        "    start = time.perf_counter()\n"
        "    a @ b\n"
        "    times.append(time.perf_counter() - start)\n"
        "print(m * k * n / min(times))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finish(done)
    return float(done.stdout)


def median_of(metrics: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(of_step.get(key, 0.0) for of_step in metrics)


def beside_trl(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a shape: both sides, and what the parts of our step stand beside."""
    shape, here = SHAPES[name], HERE.parent
    ways = {f"{p} x {args.threads // p}": p for p in args.processes}
    ours: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    alone: dict[str, list[float]] = {way: [] for way in ways}
    theirs: list[float] = []
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), shape)
        for _ in range(args.rounds):
            rates.append(product_rate(args.threads))
            theirs += trl_run(args.trl_python, files, shape, args.threads, args.steps)
            for way, processes in ways.items():
                threads = args.threads // processes
                ours[way] += our_run(here, files, shape, processes, threads, args.steps)
                with vllm_alone(files, shape, processes, threads) as answer:
                    alone[way] += [answer() for _ in range(args.steps - WARM_UP)]
        products = products_s(files, shape, statistics.median(rates))
    trl_s = statistics.median(theirs)
    figures: dict[str, Any] = {
        "trl_s": trl_s,
        "products_s": products,
        "gflop_per_s": 2e-9 * statistics.median(rates),
        "ours": {},
    }
    for way, metrics in ours.items():
        seconds = median_of(metrics, "time/step")
        stages = {stage: median_of(metrics, f"time/{stage}") for stage in STAGES}
        figures["ours"][way] = {
            "step_s": seconds,
            "ratio": trl_s / seconds,
            "vllm_alone_s": statistics.median(alone[way]),
            "stages_s": stages | {"rest": max(0.0, seconds - sum(stages.values()))},
        }
    return figures


def show(name: str, figures: dict[str, Any]) -> None:
    """Print the tables of a shape."""
    shape = SHAPES[name]
    print(f"\n{name}: {shape.num_samples} samples of {shape.response} tokens")
    print("processes x threads   s/step   TRL s/step   TRL / ours")
    for way, of_way in figures["ours"].items():
        print(f"{way:19} {of_way['step_s']:8.3f} {figures['trl_s']:12.3f} {of_way['ratio']:12.2f}")
    print(f"{'stage':14}" + "".join(f"{way:>10}" for way in figures["ours"]) + "   beside it")
    for stage in (*STAGES, "rest"):
        beside = ""
        if stage == "rollout":
            times = [of_way["vllm_alone_s"] for of_way in figures["ours"].values()]
            beside = "vLLM alone " + ", ".join(f"{seconds:.3f}" for seconds in times)
        if stage == "train":
            beside = f"products alone {figures['products_s']:.4f}"
            beside += f" ({figures['gflop_per_s']:.0f} GFLOP/s)"
        times = [of_way["stages_s"][stage] for of_way in figures["ours"].values()]
        print(f"{stage:14}" + "".join(f"{seconds:10.3f}" for seconds in times) + f"   {beside}")


def beside_other(args: argparse.Namespace) -> dict[str, Any]:
    """Return the median step of the quickstart in both states of the package."""
    shape = QUICKSTART_STEP
    trees = {"before": args.against.resolve(), "now": HERE.parent}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    processes = max(args.processes)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), shape)
        for number in range(args.rounds):
            order = sorted(trees, reverse=number % 2 == 1)
            for name in order:
                threads = args.threads // processes
                runs[name] += our_run(trees[name], files, shape, processes, threads, args.steps)
    seconds = {name: median_of(metrics, "time/step") for name, metrics in runs.items()}
    stages = {
        name: {stage: median_of(metrics, f"time/{stage}") for stage in STAGES}
        for name, metrics in runs.items()
    }
    # The same seed and layout: every number but times is the same.
    equal = all(
        before[key] == now[key]
        for before, now in zip(runs["before"], runs["now"], strict=True)
        for key in before.keys() & now.keys()
        if not key.startswith(("time/", "perf/", "weight_sync/"))
    )
    ratio = seconds["now"] / seconds["before"]
    return {"step_s": seconds, "stages_s": stages, "ratio": ratio, "equal": equal}


def show_other(figures: dict[str, Any]) -> None:
    """Print the table of both states."""
    print(f"{'':14}{'before':>10}{'now':>10}")
    for stage in STAGES:
        times = [figures["stages_s"][name][stage] for name in ("before", "now")]
        print(f"{stage:14}" + "".join(f"{seconds:10.3f}" for seconds in times))
    steps = [figures["step_s"][name] for name in ("before", "now")]
    print(f"{'step':14}" + "".join(f"{seconds:10.3f}" for seconds in steps))
    print(f"ratio {figures['ratio']:.3f} (at most {MAX_RATIO})")
    print("metrics are equal" if figures["equal"] else "metrics DIFFER")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", type=Path, help="Python of TRL's environment")
    parser.add_argument("--against", type=Path, help="folder of another state of the repository")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=12, help=f"of a run, the first {WARM_UP} out")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--threads", type=int, default=2, help="of each side, in all")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 1], help="of ours")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if (args.trl_python is None) == (args.against is None):
        parser.error("give one of --trl-python and --against; see above for how to make the former")
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} do not count")
    if any(args.threads % processes for processes in args.processes):
        parser.error(f"--threads {args.threads} is not a multiple of --processes")
    if args.against:
        figures = beside_other(args)
        show_other(figures)
    else:
        figures = {}
        for name in args.shapes:
            figures[name] = beside_trl(name, args)
            show(name, figures[name])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(args.against is not None and figures["ratio"] > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
