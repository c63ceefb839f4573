"""Whether the routes that engines return can be replayed.

An engine that returns none, or those of another part of the sequence, would train on other experts
than it sampled with, and nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcore_rl.errors import RolloutError
from mcore_rl.types import Routing, SampleGroup


def check_route_shapes(groups: Sequence[SampleGroup], routing: Routing, step: int) -> None:
    """Check that every sample has routes for all its tokens but the last.

    Raises:
        RolloutError: saying what the engine returned.
    """
    for group in groups:
        for sample in group.samples:
            expected = len(sample.token_ids) - 1, len(routing.layers), routing.topk
            routes = sample.routed_experts
            found = "none" if routes is None else f"{routes.dtype} of shape {routes.shape}"
            if routes is None or routes.shape != expected or routes.dtype.kind != "u":
                raise RolloutError(
                    f"the engine returned routed experts {found} for {len(sample.token_ids)} "
                    f"tokens, not unsigned integers of shape {expected} (tokens - 1, layers with "
                    "experts, experts per token); actor.router_replay.mode=R3 needs them",
                    role="rollout",
                    step=step,
                )


def check_routes(groups: Sequence[SampleGroup], routing: Routing, step: int) -> None:
    """Check besides that the experts exist and that those of a token differ.

    Raises:
        RolloutError: saying what the engine returned.
    """
    check_route_shapes(groups, routing, step)
    for group in groups:
        for sample in group.samples:
            assert sample.routed_experts is not None
            experts = np.sort(sample.routed_experts, axis=-1)
            is_wrong = experts[..., -1] >= routing.num_experts
            is_wrong |= (experts[..., 1:] == experts[..., :-1]).any(axis=-1)
            if is_wrong.any():
                token, layer = np.argwhere(is_wrong)[0].tolist()
                raise RolloutError(
                    f"the engine returned the experts {experts[token, layer].tolist()} for token "
                    f"{token} in layer {routing.layers[layer]}, not {routing.topk} different ones "
                    f"below {routing.num_experts}",
                    role="rollout",
                    step=step,
                )
