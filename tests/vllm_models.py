"""Tiny models that vLLM can run on CPU, and what transformers says of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tests.tiny_models import MODELS as ALL
from tests.tiny_models import make_tiny_model, tiny_config

MODELS = {name: model.vllm for name, model in ALL.items() if model.vllm is not None}


def make_model(name: str, seed: int) -> Any:
    """Return a transformers model of the sizes that vLLM can run."""
    return make_tiny_model(tiny_config(name, **MODELS[name]), seed)


@torch.no_grad()
def hf_router_logits(model: Any, token_ids: list[int], routes: torch.Tensor) -> torch.Tensor:
    """Return what the routers of a Qwen3-MoE say of every token but the last, if all tokens go to
    the experts `routes`, [n - 1, MoE layers, topk] in any order: [n - 1, MoE layers, experts].
    """
    logits = []

    def take_route(router, _inputs, output):
        of_layer, _, own_choice = output
        chosen = routes[:, len(logits)]
        assert chosen.shape == own_choice.shape
        logits.append(of_layer)
        weights = of_layer.softmax(-1).gather(-1, chosen)
        return of_layer, weights / weights.sum(-1, keepdim=True), chosen

    routers = [m for m in model.modules() if isinstance(m, Qwen3MoeTopKRouter)]
    assert all(router.norm_topk_prob for router in routers)
    hooks = [router.register_forward_hook(take_route) for router in routers]
    try:
        model(torch.tensor([token_ids[:-1]]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(logits, dim=1)


@torch.no_grad()
def hf_logprobs(
    model: Any, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """Return log_softmax(logits / temperature) of the R response tokens' predictions.

    [R, V] float32.
    """
    logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
