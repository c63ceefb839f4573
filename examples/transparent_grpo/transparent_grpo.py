"""GRPO on one page: generate, reward, advantage, update, in one process without Megatron and vLLM.

    python examples/transparent_grpo/transparent_grpo.py

A model of 260 thousand parameters learns to find a and b so that a piecewise function is continuous
(`mcore_rl/rewards/piecewise_continuity.py`), in a minute and a half of one CPU core. First it
imitates a teacher who often breaks off; then GRPO has it do what scores best.

The steps are the functions that the full system calls too: `penalize_rewards` takes the KL against
the frozen initial policy off the reward (K1), `assign_advantages` compares the samples of a group,
`actor_objective` is the loss. What is written out here is what Megatron and vLLM do there: sampling
token by token, and log-probabilities from logits. Set a breakpoint anywhere.

Shapes: B sequences in a padded batch, L their longest, V vocabulary; T tokens of all sequences laid
end to end without padding.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from mcore_rl.algorithms.advantages import AlgorithmConfig, assign_advantages
from mcore_rl.algorithms.kl_in_reward import penalize_rewards
from mcore_rl.algorithms.losses import PolicyLossInputs
from mcore_rl.algorithms.objective import (
    ObjectiveConfig,
    actor_objective,
    resolve_objective,
    sft_objective,
)
from mcore_rl.metrics import merge, to_floats
from mcore_rl.rewards.piecewise_continuity import Problem, compute_score, draw_problem
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators, Prompt, Sample, SampleGroup, VersionSpan

MAX_RESPONSE_LENGTH = 40
"""Tokens; a whole solution has 34 and an end token."""


# ---- The problem, the tokens and the model ----

LARGEST = 2
"""Of a and the middle offset: 800 problems, few enough for the model to learn to calculate."""


def is_held_out(problem: Problem) -> bool:
    """Whether a problem is for validation: one in eight, whatever the seed."""
    return random.Random(problem.question).random() < 1 / 8


def draw(rng: random.Random, *, held_out: bool) -> Problem:
    """Return a problem for training, or one for validation."""
    while is_held_out(problem := draw_problem(rng, LARGEST)) != held_out:
        pass
    return problem


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, signs and whole numbers: "2a + 3 = -3" is 6 tokens."""
    words = ["f", "x", "ax", "a", "b", "if", "is", "continuous", "Find"]
    signs = ["(", ")", "=", "<", ">", "<=", "+", "-", ",", ".", ":"]
    numbers = [str(n) for n in range(-40, 41)]
    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", *words, *signs, *numbers])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    pattern = Regex(r"-?[0-9]+|[A-Za-z]+|<=|[^\s\w]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # words with spaces between
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def make_prompt(problem: Problem, tokenizer: PreTrainedTokenizerFast, uid: str) -> Prompt:
    return Prompt(
        uid=uid,
        token_ids=tokenizer.encode(problem.question),
        text=problem.question,
        data_source="piecewise_continuity",
        ground_truth=asdict(problem),
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


# ---- Log-probabilities: the one thing that both training phases ask of the model ----


def logprobs(model: LlamaForCausalLM, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-probability of each token given those before it, [T] float32.

    0.0 for the first token of each sequence, which nothing predicts. Temperature 1.
    """
    lengths = torch.tensor([len(ids) for ids in token_ids])
    inputs_BL = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids, dtype=torch.int64) for ids in token_ids], batch_first=True
    )
    # Padding stands on the right, so causal attention never looks at it.
    logits_BLV = model(input_ids=inputs_BL).logits
    predicted_BL = logits_BLV[:, :-1].log_softmax(-1).gather(2, inputs_BL[:, 1:, None])[..., 0]
    logprobs_BL = torch.nn.functional.pad(predicted_BL, (1, 0))
    is_token_BL = torch.arange(inputs_BL.shape[1]) < lengths[:, None]
    return logprobs_BL[is_token_BL]


def denominators(segments: Segments) -> Denominators:
    """Return the counts by which the losses of a minibatch are averaged."""
    return Denominators(
        num_tokens=int(segments.num_tokens_S.sum()),
        num_sequences=int((segments.num_tokens_S > 0).sum()),
    )


# ---- Before RL: imitate a teacher ----


def teach(problem: Problem, rng: random.Random, stops: float) -> str:
    """Return a solution that breaks off after a, and after b, with probability `stops` each."""
    sentences = problem.solution.split(". ")  # on a, on b, on their sum
    length = 1
    while length < len(sentences) and rng.random() >= stops:
        length += 1
    return ". ".join(sentences[:length])


def imitate(model, tokenizer, args, rng: random.Random) -> None:
    """Train the model on the teacher's responses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.sft_lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.sft_steps, 1))
    for step in range(args.sft_steps):
        rows, masks = [], []
        for _ in range(args.sft_batch_size):
            problem = draw(rng, held_out=False)
            prompt_ids = tokenizer.encode(problem.question)
            response_ids = tokenizer.encode(teach(problem, rng, args.stops))
            rows.append([*prompt_ids, *response_ids, tokenizer.eos_token_id])
            masks.append([False] * len(prompt_ids) + [True] * (len(response_ids) + 1))
        segments = Segments.from_loss_masks(masks)
        loss, metrics = sft_objective(logprobs(model, rows), segments, denominators(segments))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 50 == 0:
            print(f"sft {step:4d}   loss {to_floats(metrics)['sft/loss']:.3f}")


# ---- 1. Generate ----


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    n: int,
    *,
    step: int,
    greedy: bool = False,
) -> list[SampleGroup]:
    """Return a group of `n` sampled responses for every prompt, one token of all at a time."""
    rows = [prompt for prompt in prompts for _ in range(n)]
    padded = tokenizer.pad({"input_ids": [row.token_ids for row in rows]}, return_tensors="pt")
    inputs_BL, mask_BL = padded["input_ids"], padded["attention_mask"]
    responses_BR = torch.empty(len(rows), 0, dtype=torch.int64)
    logprobs_BR = torch.empty(len(rows), 0)
    cache, is_done_B = None, torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(MAX_RESPONSE_LENGTH):
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -inputs_BL.shape[1] :]
        output = model(
            input_ids=inputs_BL,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
        )
        cache, logprobs_BV = output.past_key_values, output.logits[:, -1].log_softmax(-1)
        if greedy:
            tokens_B1 = logprobs_BV.argmax(-1, keepdim=True)
        else:
            tokens_B1 = torch.multinomial(logprobs_BV.exp(), 1)
        responses_BR = torch.cat([responses_BR, tokens_B1], 1)
        logprobs_BR = torch.cat([logprobs_BR, logprobs_BV.gather(1, tokens_B1)], 1)
        is_done_B |= tokens_B1[:, 0] == tokenizer.eos_token_id
        if is_done_B.all():
            break
        inputs_BL, mask_BL = tokens_B1, torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], 1)
    samples = [
        make_sample(prompt, i % n, tokens, values, tokenizer, step)
        for i, (prompt, tokens, values) in enumerate(
            zip(rows, responses_BR.tolist(), logprobs_BR.tolist(), strict=True)
        )
    ]
    return [
        SampleGroup(prompt=prompt, samples=samples[i * n : (i + 1) * n])
        for i, prompt in enumerate(prompts)
    ]


def make_sample(prompt, index, tokens, values, tokenizer, step) -> Sample:
    """Return the sample of one row, cut after its end token."""
    is_ended = tokenizer.eos_token_id in tokens
    length = tokens.index(tokenizer.eos_token_id) + 1 if is_ended else len(tokens)
    num_prompt = len(prompt.token_ids)
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=[*prompt.token_ids, *tokens[:length]],
        loss_mask=[False] * num_prompt + [True] * length,
        rollout_logprobs=[0.0] * num_prompt + values[:length],
        finish_reason="stop" if is_ended else "length",
        versions=[VersionSpan(step, 0, length)],
        response_text=tokenizer.decode(tokens[:length], skip_special_tokens=True),
    )


# ---- 2. Reward, with the KL against the initial policy taken off it ----


def score(groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """Return the groups with the reward of every sample."""
    return [replace(group, samples=[score_one(s) for s in group.samples]) for group in groups]


def score_one(sample: Sample) -> Sample:
    prompt = sample.prompt
    scores = compute_score(prompt.data_source, sample.response_text, prompt.ground_truth)
    shares = {name: share for name, share in scores.items() if name != "score"}
    return replace(sample, reward=scores["score"], reward_metrics=shares)


@torch.no_grad()
def with_ref_logprobs(
    groups: Sequence[SampleGroup], reference: LlamaForCausalLM
) -> list[SampleGroup]:
    """Return the groups with the log-probabilities of the frozen initial policy.

    One process has one policy: what sampled a token is what is trained, so `old_logprobs` are those
    of sampling. An engine beside the trainer only comes close, and the full system recomputes them.
    """
    samples = [sample for group in groups for sample in group.samples]
    ref_T = logprobs(reference, [sample.token_ids for sample in samples])
    of_sample = iter(ref_T.split([len(sample.token_ids) for sample in samples]))
    return [
        replace(
            group,
            samples=[
                replace(s, old_logprobs=s.rollout_logprobs, ref_logprobs=next(of_sample).numpy())
                for s in group.samples
            ],
        )
        for group in groups
    ]


# ---- 3. Advantages: one call, in the loop below. 4. Update: PPO's clipped loss ----


def update(model, optimizer, minibatch: Sequence[SampleGroup], objective) -> dict[str, float]:
    """Do one optimizer update on the groups of `minibatch` and return its metrics."""
    samples = [sample for group in minibatch for sample in group.samples]
    segments = Segments.from_loss_masks([sample.loss_mask for sample in samples])
    inputs = PolicyLossInputs(
        logprobs_T=logprobs(model, [sample.token_ids for sample in samples]),
        old_logprobs_T=torch.tensor(np.concatenate([sample.old_logprobs for sample in samples])),
        advantages_T=torch.tensor(np.concatenate([sample.advantages for sample in samples])),
        segments=segments,
    )
    loss, metrics = actor_objective(inputs, denominators=denominators(segments), spec=objective)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return to_floats(metrics)


# ---- The loop ----


def train(model, tokenizer, args, rng: random.Random) -> None:
    """Train by GRPO: every step generates, rewards, assigns advantages and updates."""
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    algorithm = AlgorithmConfig.of("grpo", norm_adv_by_std_in_grpo=not args.dr_grpo)
    objective = resolve_objective(ObjectiveConfig(), MAX_RESPONSE_LENGTH)

    for step in range(args.steps):
        prompts = [
            make_prompt(draw(rng, held_out=False), tokenizer, f"{step}:{i}")
            for i in range(args.prompts)
        ]
        groups = generate(model, tokenizer, prompts, args.n, step=step)
        groups = score(groups)
        mean_score = mean_reward(groups)
        groups = with_ref_logprobs(groups, reference)
        groups, kl = penalize_rewards(groups, args.kl_coef, "kl")
        groups, advantage_metrics = assign_advantages(groups, algorithm)
        for start in range(0, len(groups), args.minibatch):
            metrics = update(model, optimizer, groups[start : start + args.minibatch], objective)
        useless = to_floats(merge([advantage_metrics]))["reward/zero_std_group_frac"]
        if step % 5 == 0:
            print(
                f"step {step:4d}   score {mean_score:.3f}   kl per token {kl:.4f}   "
                f"clipped {metrics['actor/clip_frac']:.3f}   groups without a signal {useless:.2f}"
            )


def mean_reward(groups: Sequence[SampleGroup]) -> float:
    rewards = [sample.reward for group in groups for sample in group.samples]
    return sum(rewards) / len(rewards)


def evaluate(model, tokenizer, prompts: Sequence[Prompt], when: str) -> float:
    """Print the greedy score on held-out problems, its parts and a response; return the score."""
    groups = score(generate(model, tokenizer, prompts, 1, step=0, greedy=True))
    samples = [group.samples[0] for group in groups]
    parts = {
        name: sum(s.reward_metrics[name] for s in samples) / len(samples)
        for name in samples[0].reward_metrics
    }
    total = mean_reward(groups)
    print(f"\n{when}: held-out score {total:.3f}   ", end="")
    print("   ".join(f"{name} {share:.2f}" for name, share in parts.items()))
    print(f"  {samples[0].prompt.text}\n  {samples[0].response_text}\n")
    return total


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Return the held-out score before and after GRPO."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-steps", type=int, default=400)
    parser.add_argument("--sft-batch-size", type=int, default=32)
    parser.add_argument("--sft-lr", type=float, default=4e-3)
    parser.add_argument("--stops", type=float, default=0.6, help="of the teacher, see teach()")
    parser.add_argument("--steps", type=int, default=40, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=16, help="per step")
    parser.add_argument("--minibatch", type=int, default=8, help="prompts per update")
    parser.add_argument("--n", type=int, default=8, help="samples per prompt: the group")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--kl-coef", type=float, default=0.001, help="of K1 in the reward")
    parser.add_argument("--dr-grpo", action="store_true", help="do not divide by the deviation")
    parser.add_argument("--val-prompts", type=int, default=64)
    args = parser.parse_args(argv)

    disable_progress_bar()
    rng, val_rng = random.Random(args.seed), random.Random(f"{args.seed}:validation")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    val_prompts = [
        make_prompt(draw(val_rng, held_out=True), tokenizer, f"val:{i}")
        for i in range(args.val_prompts)
    ]
    imitate(model, tokenizer, args, rng)
    before = evaluate(model, tokenizer, val_prompts, "after imitation")
    train(model, tokenizer, args, rng)
    after = evaluate(model, tokenizer, val_prompts, f"after {args.steps} steps of GRPO")
    return before, after


if __name__ == "__main__":
    main()
