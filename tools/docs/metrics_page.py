"""The reference of metrics: what each key means, with how it merges and where it is written.

The keys, the rules by which they merge and the modules are read from the source; the meanings stand
here. A test fails for a key that is written and not explained, and for one that is explained and
not written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mcore_rl"

HEAD = """# Metrics

`metrics.jsonl` in the run folder has one JSON object for each step, with every key below that the
run has. Trackers get the same. Numbers are merged over micro-batches, ranks, minibatches and
samples exactly, by the rule in the third column; *share* adds up over the micro-batches and ranks
of one update and is averaged over updates. Keys are `section/name[/statistic]`. This page is
generated from the source.

[Debugging](debugging.md) says which of them to look at when something is wrong.
"""

SECTIONS = {
    "actor": "The policy, over the updates of the step.",
    "critic": "With `algorithm.adv_estimator=gae` only.",
    "reward": "Of the samples that train.",
    "advantage": "Over the trained tokens.",
    "rollout": "What the engines gave.",
    "mismatch": "Trainer against engine: log-probabilities of the same tokens. `w` is "
    "p_trainer / p_engine of a token.",
    "batch": "How samples were packed.",
    "moe": "With router replay only.",
    "weight_sync": "The last sync of weights to the engines.",
    "ledger": "Counts since the beginning of the run, in prompts, samples and tokens: generated = "
    "trained + discarded, checked in every step.",
    "eval": "Of validations, for each data source.",
    "sft": "Of `mcore_rl.sft`.",
    "perf": "Speed and memory.",
    "time": "Seconds of each stage of the step; stages that run beside others add up to more than "
    "the step.",
}

MEANINGS = {
    "actor/pg_loss": "policy loss",
    "actor/kl_loss": "KL term before its coefficient, with `actor.use_kl_loss`",
    "actor/entropy": "entropy of the policy, in nats",
    "actor/loss": "all of what is minimized",
    "actor/grad_norm": "norm of the gradient before it is clipped",
    "actor/lr": "learning rate",
    "actor/num_skipped_updates": "updates left out since their gradient norm was not finite",
    "actor/ppo_kl": "mean of old logprob - logprob: how far the updates of the step moved",
    "actor/ratio/mean": "exp(logprob - old logprob)",
    "actor/ratio/max": "the largest of it",
    "actor/ratio/min": "the smallest of it",
    "actor/clip_frac": "share of tokens that the clip holds back",
    "actor/clip_frac_lower": "vanilla: share that the dual clip bounds; geo_mean: share held back "
    "where the advantage is negative",
    "actor/seq_ratio/max": "largest ratio of a sequence, of gspo and geo_mean",
    "actor/seq_ratio/min": "smallest",
    "critic/value_loss": "loss of the values",
    "critic/clip_frac": "share of tokens whose value is held back by `critic.cliprange_value`",
    "critic/grad_norm": "as the actor's",
    "critic/lr": "as the actor's",
    "critic/num_skipped_updates": "as the actor's",
    "critic/values/mean": "mean value",
    "critic/returns/mean": "mean of what the values should have been",
    "critic/explained_variance": "1: the values explain the returns, 0: no better than a constant",
    "reward/mean": "mean reward",
    "reward/std": "its standard deviation over samples",
    "reward/<name>/mean": "a further number that the reward function gives",
    "reward/num_errors": "samples that could not be scored",
    "reward/failed_frac": "their share",
    "reward/timeout_frac": "share that took longer than `reward.timeout_s`",
    "reward/zero_std_group_frac": "share of groups whose rewards are all equal: they teach nothing",
    "reward/kl": "KL per token, with `algorithm.use_kl_in_reward`",
    "reward/kl_coef": "its coefficient",
    "reward/overlong_penalty": "mean penalty, with `reward.overlong_buffer`",
    "reward/overlong_frac": "share of samples with a penalty",
    "reward/baseline/mean": "mean reward of the greedy responses, with remax",
    "advantage/mean": "mean",
    "advantage/abs_mean": "mean of the absolute value",
    "advantage/max": "largest",
    "rollout/response_tokens/mean": "length of responses",
    "rollout/response_tokens/max": "longest",
    "rollout/response_tokens/min": "shortest",
    "rollout/truncated_frac": "share of responses that were cut off at `data.max_response_length`",
    "rollout/failed_frac": "share of responses that an engine broke off",
    "rollout/staleness/mean": "steps by which the weights of a sample are older than those that "
    "train on it",
    "rollout/staleness/max": "the oldest",
    "rollout/staleness/updates_max": "the same, counted in optimizer updates",
    "rollout/several_versions_frac": "share of samples whose tokens come from several versions of "
    "the weights",
    "rollout/in_flight/prompts": "prompts that engines work on while the step trains",
    "rollout/in_flight/samples": "their samples",
    "rollout/kept_group_frac": "share of groups that `algorithm.filter_groups` kept",
    "rollout/stopped_group_frac": "share of groups that `rollout.stop_stragglers` stopped",
    "rollout/num_gen_batches": "batches that were generated to fill the step",
    "mismatch/logprob_abs_diff/mean": "mean difference",
    "mismatch/logprob_abs_diff/max": "largest difference",
    "mismatch/k3_kl": "estimate of KL(engine, trainer)",
    "mismatch/is_weight/mean": "mean of w; 1 where both agree",
    "mismatch/is_clipped_frac": "share of tokens whose weight was cut, with `rollout_is`",
    "mismatch/is_rejected_frac": "share of tokens that weigh 0, with `rollout_rs`",
    "batch/num_micro_batches": "micro-batches of a rank",
    "batch/tokens": "tokens, prompts included",
    "batch/packing_frac": "tokens, of the room in the micro-batches",
    "batch/dp_imbalance_frac": "share of the tokens' time that data-parallel ranks wait for the "
    "fullest",
    "moe/replay_hit_frac": "share of the replayed choices that the routers would have made "
    "themselves",
    "weight_sync/bytes": "bytes that went to an engine",
    "weight_sync/num_buckets": "in so many buckets",
    "ledger/<name>/<unit>": "`generated`, `trained`, or `discarded/<reason>`, in `prompts`, "
    "`samples` or `tokens`",
    "eval/<data source>/accuracy": "mean score",
    "eval/<data source>/<k>/mean": "a further number of the reward",
    "eval/<data source>/response_tokens/mean": "length of responses",
    "eval/<data source>/truncated_frac": "share of responses that were cut off",
    "eval/<data source>/failed_frac": "share that could not be scored",
    "eval/<data source>/timeout_frac": "share that took too long to score",
    "eval/<data source>/<name>": "with several samples per prompt: `pass_at_<k>`, `best_at_<k>`, "
    "`maj_at_<k>`, `accuracy/std`: [evaluation](evaluation.md)",
    "sft/loss": "mean negative log-likelihood of the trained tokens",
    "perf/tokens_per_s": "tokens of the step per second of the step",
    "perf/engines_busy_frac": "share of the step in which engines had requests",
    "perf/engines": "engines that take requests; fewer while one is started again",
    "perf/engine_restarts": "how often engines were started again, since the run's start or resume",
    "perf/trainer_busy_frac": "share of the step in which the trainer computed",
    "perf/memory_peak_gib": "the fullest worker's largest memory; on CPU the resident set",
    "time/<stage>": "`step`, `rollout`, `reward`, `old_logprobs`, `values`, `train_critic`, "
    "`train`, `weight_sync`, `checkpoint`, `eval`",
}
"""Key -> meaning. What stands in angle brackets is a name of the run."""

RULES = {
    "mean": "mean",
    "masked_mean": "mean over trained tokens",
    "deviation": "standard deviation",
    "total": "sum",
    "share": "share",
    "maximum": "max",
    "masked_max": "max",
    "minimum": "min",
    "masked_min": "min",
    "Metric": "mean",
    "masked_sizes": "mean; the largest: max",
}
"""Constructor of a metric -> how it merges. A `Metric` that is made by hand is a weighted mean."""

SEVERAL = {
    "<role>/": ("actor/", "critic/"),
    "<section>/": ("eval/<data source>/",),
    "eval/<source>/": ("eval/<data source>/",),
}
"""Beginnings that stand for others."""

FAILURES = ("failed_frac", "timeout_frac")
"""Made without a section by `rewards.score.failure_metrics`, for rewards and validations."""


def page() -> str:
    """Return the page."""
    written = written_keys()
    text = HEAD
    for section, about in SECTIONS.items():
        text += f"\n## {section}\n\n{about}\n\n"
        text += "| key | meaning | merged by | module |\n|---|---|---|---|\n"
        for key, meaning in MEANINGS.items():
            if key.startswith(f"{section}/"):
                rule, module = written[key]
                text += f"| `{key}` | {meaning} | {rule} | `{module}` |\n"
    return text


def written_keys() -> dict[str, tuple[str, str]]:
    """Return each key that the package writes, with its rule and its module."""
    found: dict[str, tuple[str, str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = str(file.relative_to(PACKAGE))
        if module == "metrics.py":  # which makes keys of names that others give
            continue
        for key, rule in _written_in(ast.parse(file.read_text())):
            for name in _spelled_out(key):
                found.setdefault(name, (rule, module))
    for name in FAILURES:
        of_rewards = ("mean", "rewards/score.py")
        found |= {f"reward/{name}": of_rewards, f"eval/<data source>/{name}": of_rewards}
    return found


def _written_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
        elif isinstance(node, ast.DictComp):
            pairs = [(node.key, node.value)]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            pairs = [(node.targets[0].slice, node.value)]
        elif isinstance(node, ast.Call) and _called(node) == "masked_sizes":
            prefix = ast.literal_eval(node.args[0])
            yield from ((f"{prefix}/{x}", "mean over trained tokens") for x in ("mean", "abs_mean"))
            yield f"{prefix}/max", "max"
            continue
        else:
            continue
        for key, value in pairs:
            name = _text(key)
            if isinstance(value, ast.Call) and _called(value) in RULES and "/" in name:
                yield name, RULES[_called(value)]


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _text(key: ast.expr | None) -> str:
    """Return a key, with the last name of each expression in it in angle brackets."""
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return key.value
    if isinstance(key, ast.JoinedStr):
        parts = [
            f"<{ast.unparse(part.value).rpartition('.')[2]}>"
            if isinstance(part, ast.FormattedValue)
            else str(ast.literal_eval(part))
            for part in key.values
        ]
        return "".join(parts)
    return ""


def _spelled_out(key: str) -> list[str]:
    for start, others in SEVERAL.items():
        if key.startswith(start):
            return [other + key.removeprefix(start) for other in others]
    return [key]
