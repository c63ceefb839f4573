"""How far Megatron and vLLM are from transformers: log-probabilities, and outputs of modules.

transformers runs in this process, one sequence at a time and without padding, with eager attention.
What comes out of a module is compared with the largest number that comes out of it; of each module
and of each pair of log-probabilities the largest difference is kept. A difference that is not a
number is the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_rl.dtypes import torch_dtype
from mcore_rl.models.reference import build_reference
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.verify.model_run import Scored, layer_output_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One difference, or the largest of several."""

    size: float
    where: str

    def __str__(self) -> str:
        return f"{self.size:.1e} ({self.where})"


def largest(differences: Iterable[Difference]) -> Difference:
    """Return the largest difference, which is one that is not a number if there is one."""
    return max(differences, key=lambda one: (math.isnan(one.size), one.size))


class TransformersModel:
    """The model of a folder as transformers computes it.

    Args:
        folder: model folder.
        dtype: one of `dtypes.DTYPES`.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers.utils import logging  # seconds, so only when needed

        logging.disable_progress_bar()
        model = build_reference(folder, torch_dtype(dtype))
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        names = [f"model.layers.{layer}" for layer in range(self.model.config.num_hidden_layers)]
        self.names = ["model.embed_tokens", *names, "model.norm"]
        """Of the modules whose outputs are compared, in their order."""

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> tuple[list[float], dict[str, Tensor]]:
        """Return the log-probability of every token but the first, and what comes out of each
        module, [tokens - 1, H] float32."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs[name] = hidden.squeeze(0).float().cpu()

        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: keep(name, output)
            )
            for name in self.names
        ]
        inputs_T = torch.tensor(token_ids[:-1], device=self.model.device)
        labels_T = torch.tensor(token_ids[1:], device=self.model.device)
        logits_TV = self.model(inputs_T.unsqueeze(0)).logits.squeeze(0).float()
        for hook in hooks:
            hook.remove()
        logprobs_T = logits_TV.log_softmax(-1).gather(-1, labels_T.unsqueeze(-1)).squeeze(-1)
        return logprobs_T.tolist(), outputs


def compare_with_transformers(
    model: TransformersModel, scored: Sequence[Scored], outputs: CheckpointReader
) -> tuple[list[list[float]], dict[str, Difference]]:
    """Return the log-probabilities that transformers gives to every token but the first, by
    sequence, and the largest difference of each module, in their order.

    Args:
        model: what is compared with.
        scored: the sequences.
        outputs: of Megatron's modules, by `layer_output_name`.
    """
    logprobs: list[list[float]] = []
    differences: dict[str, list[Difference]] = {name: [] for name in model.names}
    for number, row in enumerate(scored):
        values, of_module = model.score(row.token_ids)
        logprobs.append(values)
        for name, expected in of_module.items():
            found = outputs.read(layer_output_name(number, name))
            size = float((found - expected).abs().max() / expected.abs().max())
            differences[name].append(Difference(size=size, where=f"sequence {number + 1}"))
    return logprobs, {name: largest(found) for name, found in differences.items()}


def compare_logprobs(
    sides: Mapping[str, Sequence[Sequence[float]]], one: str, other: str
) -> list[Difference]:
    """Return the differences of two sides, token by token.

    Args:
        sides: by name the log-probabilities by sequence; each list ends with the last token.
        one: the side that may lack the first tokens.
        other: the other side.
    """
    differences = []
    for number, (ours, theirs) in enumerate(zip(sides[one], sides[other], strict=True)):
        start = len(theirs) - len(ours)
        for place, value in enumerate(ours, start=start):
            # Token 0 has no log-probability, and people count from 1.
            where = f"sequence {number + 1}, token {place + 2}"
            differences.append(Difference(size=abs(value - theirs[place]), where=where))
    return differences
