"""Peak memory and time of the blocked log-probabilities beside the plain formula.

    python benchmarks/logprobs.py                       # vocabulary 151,936, 8,192 tokens
    python benchmarks/logprobs.py --tokens 2048 --repeats 1

Both compute log-probabilities and entropy in float32, then the gradient of a weighted sum of the
log-probabilities for hidden states and weight. Each measurement has a process of its own, one at a
time, turn about. Its memory is the peak of the resident set from the call on, less what was
resident before (interpreter, torch, the inputs): gradients count, on both sides. Time excludes the
making of inputs. The figures of a form are medians over its processes.

Exit code 1 when a line of the contract fails: at most 1/8 of the memory, at most 1.3 times the
time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MOST_MEMORY = 1 / 8
MOST_TIME = 1.3
FORMS = ("naive", "blocked")


def measure(form: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one form once in this process and return its figures."""
    import torch

    from mcore_rl.megatron.logprobs import logprobs_reference, vocab_parallel_logprobs

    torch.set_num_threads(args.threads)

    def inputs(num_tokens: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)
        hidden_TH = torch.randn(num_tokens, args.hidden, generator=generator)
        weight_VH = torch.randn(vocab_size, args.hidden, generator=generator)
        weight_VH *= 2 * args.hidden**-0.5
        labels_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
        factors_T = torch.randn(num_tokens, generator=generator)
        return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), labels_T, factors_T

    def run(hidden_TH, weight_VH, labels_T, factors_T):
        if form == "naive":
            logprobs_T, entropy_T = logprobs_reference(hidden_TH, weight_VH, labels_T, 1.0)
        else:
            logprobs_T, entropy_T = vocab_parallel_logprobs(
                hidden_TH,
                weight_VH,
                labels_T,
                temperature=1.0,
                vocab_size=weight_VH.shape[0],
                group=None,
                with_entropy=True,
            )
        assert entropy_T is not None, "asked for above"
        mean_entropy = float(entropy_T.detach().mean())
        del entropy_T
        loss = factors_T @ logprobs_T
        loss.backward()
        return float(loss.detach()), mean_entropy

    run(*inputs(64, 512))  # starts threads and loads kernels
    full = inputs(args.tokens, args.vocab)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _status_bytes("VmRSS")
    clock = CLOCKS[args.clock]
    start = clock()
    loss, mean_entropy = run(*full)
    seconds = clock() - start
    return {
        "peak_gib": (_status_bytes("VmHWM") - before) / 2**30,
        "time_s": seconds,
        "loss": loss,
        "entropy": mean_entropy,
        "grad_norm": float(full[1].grad.norm()),
    }


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _in_own_process(form: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(args: argparse.Namespace) -> bool:
    """Measure both forms, print figures and ratios, and return whether the contract holds."""
    logits = 4 * args.tokens * args.vocab
    needed = 4 * logits + 3 * 4 * args.vocab * args.hidden + 2**30
    if _available_bytes() < needed:
        sys.exit(f"the naive form needs {needed / 2**30:.0f} GiB of free memory: lower --tokens")
    print(
        f"{args.tokens} tokens, vocabulary {args.vocab}, hidden {args.hidden}, float32, "
        f"{args.threads} threads, {args.clock} clock; whole logits are {logits / 2**30:.2f} GiB"
    )
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for _ in range(args.repeats):
        for form in FORMS:
            result = _in_own_process(form)
            found[form].append(result)
            print(
                f"{form:8} peak {result['peak_gib']:6.2f} GiB   time {result['time_s']:7.2f} s   "
                f"loss {result['loss']:.3f}  entropy {result['entropy']:.5f}  "
                f"grad norm {result['grad_norm']:.4f}",
                flush=True,
            )

    def ratio(name: str) -> float:
        naive, blocked = (statistics.median(r[name] for r in found[form]) for form in FORMS)
        return blocked / naive

    checks = [
        ("memory", ratio("peak_gib"), MOST_MEMORY),
        ("time", ratio("time_s"), MOST_TIME),
    ]
    for name, value, most in checks:
        verdict = "pass" if value <= most else "FAIL"
        print(f"{name:8} blocked / naive = {value:.3f}   at most {most:.3f}   {verdict}")
    return all(value <= most for _, value, most in checks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="processes per form")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: for a loaded machine, with --threads 1",
    )
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # one process's part
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu adds up the threads: give --threads 1")
    if args.form:
        print(json.dumps(measure(args.form, args)))
    elif not compare(args):
        sys.exit(1)


if __name__ == "__main__":
    main()
