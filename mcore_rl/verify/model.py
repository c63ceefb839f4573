"""`mcore-rl verify model`: transformers, Megatron and vLLM give the same log-probabilities.

    mcore-rl verify model --model /models/Qwen3-0.6B --layout tp2

Megatron in the layout and vLLM, its weights synced from there, run in processes of their own, as in
training: vLLM continues the prompts, Megatron scores prompts and responses. Then transformers, in
this process, scores them one by one. Each pair is compared token by token.

Besides, what comes out of the embedding, of every decoder layer and of the final norm is compared
between Megatron and transformers, in the layout itself, relative to the largest number that comes
out of the module. That does not decide whether the check passes, which log-probabilities do; it
says where a departure begins. Where none of these modules departs, it is the output layer.

Weights are synced twice. Each time vLLM has to have loaded the parameters, before it packs them,
that it loads from the folder by its own reader, bit by bit.

    mcore-rl verify model --model /models/Qwen3-0.6B rollout.host=process \\
        rollout.tensor_model_parallel_size=2

takes further keys of a run's `rollout` section: where the engine is, its size, the transport.

An engine that cannot start leaves the other two to be compared. One that starts and then fails is
a failure. A number that is not finite departs from everything.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcore_rl import tolerances
from mcore_rl.data.chat import encode_prompt, load_tokenizer
from mcore_rl.dtypes import DTYPES
from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError, require
from mcore_rl.model_files import find_model
from mcore_rl.models.rope import check_length
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import check_weights, load_hf_config
from mcore_rl.verify.layout_names import NamedLayout, parse_layout
from mcore_rl.verify.model_compare import (
    Difference,
    TransformersModel,
    compare_logprobs,
    compare_with_transformers,
    largest,
)
from mcore_rl.verify.model_run import (
    LAYERS_FOLDER,
    LOADED_FILE,
    MODULE,
    STARTED_FILE,
    Prompts,
    read_scored,
)
from mcore_rl.verify.options import add_limits, check_json, find_whole_model, new_parser
from mcore_rl.verify.processes import Ended, run_module
from mcore_rl.verify.runs import check_fits, quoted

PAIRS = (("Megatron", "transformers"), ("vLLM", "transformers"), ("vLLM", "Megatron"))


def add_parser(parsers: Any) -> None:
    """Add the command to those of `mcore-rl verify`."""
    summary = "transformers, Megatron and vLLM give the same log-probabilities"
    parser = new_parser(parsers, "model", summary, __doc__, run)
    add = parser.add_argument
    add("--layout", help="of Megatron, such as tp2pp2 or ep2; default: one process")
    add("--against", type=Path, help="model folder for transformers; default: that of --model")
    add("--prompts", type=Path, help="text file, a prompt per line; default: random tokens")
    add("--sequences", type=int, help="number of random prompts; default: 8")
    add("--max-length", type=int, help="tokens of the longest random prompt; default: 32")
    add("--max-tokens", type=int, help="by which vLLM continues each prompt; default: 16")
    add("--no-engine", action="store_true", help="leave vLLM out")
    add("--dtype", default="float32", help=f"{' or '.join(DTYPES)}, on all sides")
    add("--tolerance", type=float, help=f"default in float32: {tolerances.FLOAT32:g}")
    add_limits(
        parser,
        seed_of="random prompts and of what is generated",
        layout="the layout",
        timed="the processes",
        written="all log-probabilities",
    )
    add("overrides", nargs="*", metavar="rollout.key=value", help="keys of a run, of the engine")


def run(args: argparse.Namespace) -> int:
    """Check every input, then run and compare; return the exit code."""
    check_numbers(args)
    layout = parse_layout(args.layout, "--layout") if args.layout else NamedLayout("one", {})
    hf_config = find_whole_model(args)
    check_fits(MODULE, overrides(args, layout), hf_config, args.max_processes)
    against = find_model(args.against or args.model, "--against", download=True)
    check_against(against, hf_config)
    prompts = Prompts(
        token_ids=read_prompts(args) if args.prompts else random_prompts(args, hf_config),
        max_tokens=0 if args.no_engine else args.max_tokens or 16,
        seed=args.seed,
    )
    longest = max(map(len, prompts.token_ids)) + prompts.max_tokens
    check_length(hf_config, longest, "longest prompt + --max-tokens")

    with tempfile.TemporaryDirectory(prefix="verify-model-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        ended, left_out = score(args, layout, prompts, work)
        if ended.exit_code != 0:
            sys.stderr.write(ended.log)
            hint = "" if left_out else " (--no-engine compares the other two)"
            sys.stdout.write(f"failed: {ended.reason}{hint}\n")
            return 1
        scored = read_scored(work)
        num_loaded = (work / LOADED_FILE).read_text() if not left_out else ""
        logprobs, layers = compare_with_transformers(
            TransformersModel(against, args.dtype), scored, CheckpointReader(work / LAYERS_FOLDER)
        )
    sides = {"transformers": logprobs, "Megatron": [row.megatron for row in scored]}
    if left_out:
        sys.stdout.write(f"vLLM is left out: {left_out}\n")
    else:
        sides["vLLM"] = [row.engine for row in scored]
        sys.stdout.write(
            f"vLLM: {num_loaded} parameters from two syncs are the folder's, bit by bit\n"
        )
    if args.json:
        tokens = [row.token_ids for row in scored]
        text = json.dumps({"token_ids": tokens, "logprobs": sides}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    return report(sides, layers, args.tolerance or tolerances.FLOAT32)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise a UserError for a number out of range or an option that would be ignored."""
    for key, least in {
        "--sequences": 1,
        "--max-length": 2,
        "--max-tokens": 1,
        "--max-processes": 1,
    }.items():
        value = _option(args, key)
        require(value is None or value >= least, key, value, f"must be at least {least}")
    for key in ("--timeout", "--tolerance"):
        value = _option(args, key)
        require(value is None or value > 0, key, value, "must be greater than 0")
    for key, other in {
        "--sequences": "--prompts",
        "--max-length": "--prompts",
        "--max-tokens": "--no-engine",
    }.items():
        value, is_ignored = _option(args, key), bool(_option(args, other))
        rule = f"has no effect with {other}"
        require(value is None or not is_ignored, key, value, rule, "Leave it out.")
    require(
        args.dtype == "float32" or args.tolerance is not None,
        "--dtype",
        args.dtype,
        "has no tolerance of its own: how far it rounds hangs on the model",
        "Give --tolerance.",
    )
    for override in args.overrides:
        is_of_engine = override.startswith("rollout.") and "=" in override
        rule = "is no key of the engine"
        require(is_of_engine, "argument", override, rule, "Write rollout.key=value.")
        require(not args.no_engine, override, "given", "has no effect with --no-engine")
    check_json(args)


def _option(args: argparse.Namespace, key: str) -> Any:
    return getattr(args, key.removeprefix("--").replace("-", "_"))


def check_against(folder: Path, expected: Any) -> None:
    """Raise a UserError unless tokens and layers of the model in `folder` can be compared with
    those of a model of the configuration `expected`."""
    hf_config = load_hf_config(folder, "--against")
    check_weights(folder, hf_config)
    for name in ("vocab_size", "num_hidden_layers", "hidden_size"):
        found, wanted = getattr(hf_config, name), getattr(expected, name)
        require(found == wanted, f"--against: {name}", found, f"is not {wanted}, as in --model")


def overrides(args: argparse.Namespace, layout: NamedLayout) -> list[str]:
    """Return the configuration of the run, less its folder."""
    return [
        f"model.path={quoted(args.model)}",
        f"actor.megatron.dtype={args.dtype}",
        "actor.ppo_micro_batch_size_per_gpu=2",  # several rows of several sequences
        *layout.overrides,
        *args.overrides,
    ]


def read_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Return the prompts of a text file, with the model's chat template where it has one."""
    try:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={str(args.prompts)!r} cannot be read: {error}.") from error
    texts = [line for line in lines if line.strip()]
    require(bool(texts), "--prompts", str(args.prompts), "holds no line that is not empty")
    tokenizer = load_tokenizer(str(args.model))
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    short = [text for text, prompt in zip(texts, prompts, strict=True) if len(prompt) < 2]
    require(not short, "--prompts: line", short[:1], "has one token, which predicts nothing")
    return prompts


def random_prompts(args: argparse.Namespace, hf_config: Any) -> list[list[int]]:
    """Return random tokens in prompts of different lengths, one of them the longest allowed."""
    rng, longest, count = random.Random(args.seed), args.max_length or 32, args.sequences or 8
    lengths = [longest, *(rng.randint(2, longest) for _ in range(1, count))]
    return [[rng.randrange(hf_config.vocab_size) for _ in range(length)] for length in lengths]


def score(
    args: argparse.Namespace, layout: NamedLayout, prompts: Prompts, work: Path
) -> tuple[Ended, str]:
    """Run Megatron and the engine; once more without the engine where it cannot start.

    Returns:
        How the last run ended, and why there was no engine in it ("" if there was).

    Raises:
        UserError: as the run did.
    """
    prompts.write(work)
    argv = [*overrides(args, layout), f"trainer.default_local_dir={quoted(work)}"]
    ended = run_module(MODULE, argv, work / "log.txt", args.timeout)
    if ended.exit_code == USER_ERROR_EXIT_CODE:
        raise UserError(ended.reason)
    has_engine = prompts.max_tokens > 0
    if not has_engine:
        return ended, "--no-engine"
    if ended.exit_code == 0 or (work / STARTED_FILE).exists():
        return ended, ""
    alone = Prompts(token_ids=prompts.token_ids, max_tokens=0, seed=prompts.seed)
    args = argparse.Namespace(**{**vars(args), "overrides": []})  # they are of the engine
    return score(args, layout, alone, work)[0], ended.reason


def report(
    sides: Mapping[str, Sequence[Sequence[float]]],
    layers: Mapping[str, Difference],
    tolerance: float,
) -> int:
    """Write what came out and return the exit code.

    Args:
        sides: log-probabilities of the sequences by side; no "vLLM" where there was none.
        layers: the largest relative difference of each module.
        tolerance: absolute of log-probabilities, relative of what comes out of a module.
    """
    write = sys.stdout.write
    passed = True
    for one, other in PAIRS:
        if one not in sides:
            continue
        differences = compare_logprobs(sides, one, other)
        worst = largest(differences)
        agree = worst.size <= tolerance
        passed = passed and agree
        verdict = "agree" if agree else "DEPART"
        write(f"{one} - {other}: {len(differences)} log-probabilities {verdict}, by {worst}\n")
    departing = [name for name, worst in layers.items() if not worst.size <= tolerance]
    if departing:
        write(f"first module that departs: {departing[0]}, by {layers[departing[0]]}\n")
    else:
        write(f"all {len(layers)} modules agree, by {largest(layers.values())}\n")
    write(f"{'passed' if passed else 'FAILED'} within {tolerance:g}\n")
    return 0 if passed else 1
