"""Log-probabilities of a large vocabulary: memory and time, in blocks and in one piece."""

from __future__ import annotations

import torch

from gpu_checks.outcome import Bound, Outcome, Values, free_memory, now
from gpu_checks.sizes import Sizes


def logprob_memory(sizes: Sizes, device: torch.device) -> Outcome:
    """Forward and backward of the logprobs of a large vocabulary, blocked and in one piece."""
    from mcore_rl.megatron.logprobs import logprobs_reference, vocab_parallel_logprobs

    torch.manual_seed(3)
    tokens, hidden, vocab = sizes.logprob_tokens, sizes.logprob_hidden, sizes.logprob_vocab
    hidden_TH = torch.randn(tokens, hidden, device=device).bfloat16()
    weight_VH = (torch.randn(vocab, hidden, device=device) * hidden**-0.5).bfloat16()
    labels_T = torch.randint(vocab, (tokens,), device=device)

    def blocked(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_logprobs(
            hidden_TH,
            weight_VH,
            labels_T,
            temperature=1.0,
            vocab_size=vocab,
            group=None,
            with_entropy=False,
        )[0]

    def naive(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return logprobs_reference(hidden_TH, weight_VH, labels_T, 1.0)[0]

    values: Values = {}
    results = []
    for name, function in (("blocked", blocked), ("naive", naive)):
        leaves = [x.clone().requires_grad_() for x in (hidden_TH, weight_VH)]
        try:
            function(*leaves).sum().backward()  # the first call also chooses kernels
            free_memory(device)
            held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            start = now(device)
            logprobs_T = function(*leaves)
            logprobs_T.sum().backward()
            values[f"{name}/seconds"] = now(device) - start
        except torch.cuda.OutOfMemoryError:
            values[f"{name}/out_of_memory"] = True
            continue
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - held
            values[f"{name}/peak_gib"] = peak / 2**30
        results.append(logprobs_T.detach())
    bounds = []
    if len(results) == 2:
        difference = float((results[0] - results[1]).abs().max())
        values["max_abs_diff"] = difference
        reason = "the same matrix product in bfloat16, cut otherwise"
        bounds.append(Bound("max_abs_diff", difference, 0.05, reason))
    if "naive/peak_gib" in values:
        share = values["blocked/peak_gib"] / values["naive/peak_gib"]
        values["share_of_naive_peak"] = share
        reason = "a block of the vocabulary at a time, and never all logits"
        bounds.append(Bound("share_of_naive_peak", share, 0.25, reason))
    return Outcome(values, bounds)
