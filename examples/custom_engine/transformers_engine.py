"""A rollout engine of one's own: plain transformers, a token of every request at a time, no cache.

Slow, and short enough to read: what an engine owes its host. Importing the module registers the
engine; `MCORE_RL_PLUGINS` has every process import it. For small models on CPU. It draws from the
whole vocabulary: `top_p` and `top_k` of validations are refused. Routes are not recorded.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mcore_rl.dtypes import torch_dtype
from mcore_rl.errors import require
from mcore_rl.models.reference import build_reference
from mcore_rl.models.spec import load_hf_config, model_family
from mcore_rl.rollout.base import (
    ENGINES,
    EngineKind,
    EnginePart,
    EngineSpec,
    GenerationRequest,
    GenerationResult,
)
from mcore_rl.types import VersionSpan
from mcore_rl.weight_sync.base import Link, NamedTensors
from mcore_rl.weight_sync.digest import Manifest, full_digest
from mcore_rl.weight_sync.intake import Intake, refuse


@dataclass
class Running:
    """A response that is being drawn."""

    request: GenerationRequest
    source: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def result(self, finish_reason: str) -> GenerationResult:
        """Return what has been drawn, with the version of the weights of each stretch of tokens."""
        starts = [i for i, v in enumerate(self.versions) if i == 0 or v != self.versions[i - 1]]
        stops = [*starts[1:], len(self.versions)]
        spans = [
            VersionSpan(self.versions[a], a, b) for a, b in zip(starts, stops, strict=bool(starts))
        ]
        return GenerationResult(
            token_ids=self.tokens,  # type: ignore[arg-type]  # becomes an array
            logprobs=self.logprobs,  # type: ignore[arg-type]
            finish_reason=finish_reason,
            versions=spans,
        )


class TransformersEngine:
    """A `RolloutEngine`. Between a start and a finish of an update it has no weights."""

    def __init__(self, spec: EngineSpec, link: Link) -> None:
        validation = spec.config.val_kwargs
        for key, is_off in (("top_p", validation.top_p == 1), ("top_k", validation.top_k == -1)):
            value = getattr(validation, key)
            require(is_off, f"rollout.val_kwargs.{key}", value, "is not supported")
        require(spec.routing is None, "actor.router_replay.mode", "R3", "is not supported")
        self.weight_version = -1
        self._spec, self._dtype = spec, torch_dtype(spec.dtype)
        self._intake = Intake(link, self._load)
        self._running: dict[int, Running] = {}
        self._model: Any = None

    # What is generated.

    def add(self, number: int, request: GenerationRequest) -> None:
        source = torch.Generator().manual_seed(request.sampling.seed % 2**63)
        self._running[number] = Running(request, source)

    def step(self) -> list[tuple[int, GenerationResult]]:
        """Draw a token of every request; return those that have ended."""
        ended = []
        for number, running in list(self._running.items()):
            self._draw(running)
            is_stopped = running.tokens[-1] in self._spec.stop_token_ids
            if is_stopped or len(running.tokens) == running.request.sampling.max_tokens:
                del self._running[number]
                ended.append((number, running.result("stop" if is_stopped else "length")))
        return ended

    @torch.inference_mode()
    def _draw(self, running: Running) -> None:
        ids = [*running.request.prompt_token_ids.tolist(), *running.tokens]
        logits_V = self._model(torch.tensor([ids])).logits[0, -1].float()
        temperature = running.request.sampling.temperature
        logprobs_V = torch.log_softmax(logits_V / (temperature or 1.0), dim=0)
        if temperature == 0:
            token = int(logprobs_V.argmax())
        else:
            token = int(logprobs_V.exp().multinomial(1, generator=running.source))
        running.tokens.append(token)
        running.logprobs.append(float(logprobs_V[token]))
        running.versions.append(self.weight_version)

    def abort(self, numbers: Sequence[int]) -> list[tuple[int, GenerationResult]]:
        return [(number, self._running.pop(number).result("abort")) for number in numbers]

    def any_rank(self, is_so: bool) -> bool:
        return is_so  # it is one process

    # How new weights come. The intake compares what arrives with what was sent.

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weight_version, self._coming_version = -1, version
        self._tensors: dict[str, torch.Tensor] = {}
        self._with_digests = with_digests
        self._intake.begin(version)

    def update_weights(self, update: Any) -> None:
        self._intake.receive(update)

    def _load(self, tensors: NamedTensors) -> None:
        # The transport may use the memory again.
        self._tensors |= {name: tensor.clone() for name, tensor in tensors}

    def finish_weight_update(self, manifest: Manifest) -> None:
        refuse(self._intake.differences(manifest), self._coming_version)
        self._intake.end()
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(Path(self._spec.model_path) / "config.json", folder)
            save_file(self._tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
            self._model = build_reference(folder, self._dtype).eval()
        self.weight_version = self._coming_version

    def abort_weight_update(self) -> None:
        self._intake.end()

    def loaded_digests(self) -> list[dict[str, str]]:
        tensors = self._tensors if self._with_digests else {}
        return [{name: full_digest(tensor) for name, tensor in tensors.items()}]

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        self.weight_version = -1
        config = load_hf_config(folder)
        unused = model_family(config).unused_prefixes(config)
        tensors: dict[str, torch.Tensor] = {}
        for file in Path(folder).glob("*.safetensors"):
            tensors |= load_file(file)
        return [
            {
                name: full_digest(tensor.to(self._dtype))
                for name, tensor in tensors.items()
                if not name.startswith(unused)
            }
        ]

    # Room on the device: there is nothing to free.

    def sleep(self, level: int) -> None:
        if level > 1:
            self.weight_version = -1

    def wake(self, part: EnginePart) -> None:
        pass

    def close(self) -> None:
        self._intake.close()


ENGINES.add("transformers", EngineKind(load=lambda: TransformersEngine, has_texts=False))
