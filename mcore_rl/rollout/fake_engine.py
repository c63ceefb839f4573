"""A deterministic engine without a model, for tests of the loop and for dry runs.

Its response to a prompt depends only on prompt and seed: tokens drawn uniformly from the
vocabulary, each with log-probability -log(vocabulary), ended by a stop token after a drawn length.
Routes, when asked for, are drawn uniformly too.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from mcore_rl.dtypes import torch_dtype
from mcore_rl.rollout.base import (
    EnginePart,
    EngineSpec,
    GenerationRequest,
    GenerationResult,
)
from mcore_rl.types import VersionSpan
from mcore_rl.weight_sync.base import Link, NamedTensors
from mcore_rl.weight_sync.digest import Manifest, full_digest
from mcore_rl.weight_sync.intake import Intake, refuse


def response_length(request: GenerationRequest) -> int:
    """Return how many tokens the engine answers with, without drawing them."""
    max_tokens = request.sampling.max_tokens
    return min(_length(_source(request), max_tokens), max_tokens)


def _source(request: GenerationRequest) -> random.Random:
    return random.Random(f"{request.sampling.seed}:{request.prompt_token_ids.tolist()}")


def _length(source: random.Random, max_tokens: int) -> int:
    """Return the drawn length; beyond `max_tokens` the response is cut."""
    return source.randint(1, max_tokens + 1)


def _pass_by(tensors: NamedTensors) -> None:
    """Load nothing."""


@dataclass(slots=True)
class _Running:
    """A response that is returned token by token; it is computed at the start."""

    whole: GenerationResult
    num_drawn: int = 0
    versions: list[VersionSpan] = field(default_factory=list)

    def draw(self, version: int) -> bool:
        """Draw one more token; return whether it was the last."""
        span = VersionSpan(version, self.num_drawn, self.num_drawn + 1)
        if self.versions and self.versions[-1].version == version:
            span = replace(self.versions.pop(), end=span.end)
        self.versions.append(span)
        self.num_drawn += 1
        return self.num_drawn == len(self.whole.token_ids)

    def drawn(self, finish_reason: str) -> GenerationResult:
        """Return what has been drawn."""
        num, routes = self.num_drawn, self.whole.routed_experts
        unused = len(self.whole.token_ids) - num
        if isinstance(routes, np.ndarray) and unused:
            routes = routes[:-unused]
        return GenerationResult(
            token_ids=self.whole.token_ids[:num],
            logprobs=self.whole.logprobs[:num],
            finish_reason=finish_reason,
            versions=self.versions,
            routed_experts=routes,
        )


class FakeEngine:
    """A `RolloutEngine` that draws tokens uniformly; counts what it is given."""

    def __init__(self, spec: EngineSpec, link: Link) -> None:
        config = json.loads((Path(spec.model_path) / "config.json").read_text())
        self.vocab_size = int(config["vocab_size"])
        self.weight_version = -1
        self.num_updated_tensors = 0
        self._running: dict[int, _Running] = {}
        # It is one process, even if a real engine of this size would be several.
        self._intakes = [
            Intake(replace(link, receiver=number), self._load if number == 0 else _pass_by)
            for number in range(link.num_receivers)
        ]
        self._digests: dict[str, str] = {}
        self._stop_token_ids = list(spec.stop_token_ids)
        self._routing, self._dtype = spec.routing, torch_dtype(spec.dtype)

    def add(self, number: int, request: GenerationRequest) -> None:
        self._running[number] = _Running(self._draw(request))

    def step(self) -> list[tuple[int, GenerationResult]]:
        """Draw one token of every request."""
        ended = [n for n, running in self._running.items() if running.draw(self.weight_version)]
        found = [(n, self._running.pop(n)) for n in ended]
        return [(n, running.drawn(running.whole.finish_reason)) for n, running in found]

    def abort(self, numbers: Sequence[int]) -> list[tuple[int, GenerationResult]]:
        return [(number, self._running.pop(number).drawn("abort")) for number in numbers]

    def any_rank(self, is_so: bool) -> bool:
        return is_so

    def sleep(self, level: int) -> None:
        if level > 1:
            self.weight_version = -1

    def wake(self, part: EnginePart) -> None:
        pass

    def _draw(self, request: GenerationRequest) -> GenerationResult:
        sampling = request.sampling
        source = _source(request)
        length = _length(source, sampling.max_tokens)
        tokens = [
            source.randrange(self.vocab_size) for _ in range(min(length, sampling.max_tokens))
        ]
        finish_reason = "length"
        if length <= sampling.max_tokens and self._stop_token_ids:
            tokens[-1], finish_reason = self._stop_token_ids[0], "stop"
        num_inputs = len(request.prompt_token_ids) + len(tokens) - 1
        return GenerationResult(
            token_ids=np.array(tokens, np.int32),
            logprobs=np.full(len(tokens), -math.log(self.vocab_size), np.float32),
            finish_reason=finish_reason,
            versions=(),
            routed_experts=self._draw_routes(source, num_inputs),
        )

    def _draw_routes(self, source: random.Random, num_inputs: int) -> np.ndarray | None:
        if self._routing is None:
            return None
        experts, topk = range(self._routing.num_experts), self._routing.topk
        return np.array(
            [
                [source.sample(experts, topk) for _ in self._routing.layers]
                for _ in range(num_inputs)
            ],
            np.uint16,
        ).reshape(num_inputs, len(self._routing.layers), topk)

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weight_version = -1
        self.num_updated_tensors = 0
        self._coming_version, self._with_digests, self._digests = version, with_digests, {}
        for intake in self._intakes:
            intake.begin(version)

    def update_weights(self, update: Any) -> None:
        for intake in self._intakes:
            intake.receive(update)

    def _load(self, tensors: NamedTensors) -> None:
        self.num_updated_tensors += len(tensors)
        if self._with_digests:
            self._digests |= {name: full_digest(tensor) for name, tensor in tensors}

    def finish_weight_update(self, manifest: Manifest) -> None:
        for intake in self._intakes:
            refuse(intake.differences(manifest), self._coming_version)
            intake.end()
        self.weight_version = self._coming_version

    def abort_weight_update(self) -> None:
        for intake in self._intakes:
            intake.end()

    def loaded_digests(self) -> list[dict[str, str]]:
        return [self._digests]

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        self.weight_version = -1
        tensors = {}
        for file in Path(folder).glob("*.safetensors"):
            tensors |= load_file(file)
        return [{name: full_digest(x.to(self._dtype)) for name, x in tensors.items()}]

    def close(self) -> None:
        for intake in self._intakes:
            intake.close()
