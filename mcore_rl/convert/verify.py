"""Whether two checkpoints are the same model: every tensor, and the logits of a few prompts.

Tensors are compared bit by bit under their Hugging Face names. Logits are computed in float32, by
transformers from the one folder and by Megatron, on one process, from the other. Unlike a
conversion this builds the model: twice, one after the other, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig

from mcore_rl.convert.convert import read_param
from mcore_rl.convert.safetensors_stream import SafetensorsSource
from mcore_rl.convert.stored import StoredParam, stored_params
from mcore_rl.errors import require
from mcore_rl.models.mappings import to_hf
from mcore_rl.models.reference import build_reference
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import load_hf_config
from mcore_rl.processes import collective_backend
from mcore_rl.torch_dist.parts import bytes_of
from mcore_rl.torch_dist.source import TorchDistSource
from mcore_rl.types import Layout, MicroBatch, TokenSequence

TOLERANCE = 1e-4
"""Of the largest logit, or of 1: float32 sums in another order."""

_NUM_PROMPTS, _PROMPT_TOKENS = 4, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `verify` found."""

    num_tensors: int
    different: list[str]
    """Hugging Face names of tensors that are not equal."""
    logit_difference: float
    """Largest absolute difference of two logits; not finite where one of them is not."""
    limit: float

    @property
    def passed(self) -> bool:
        finite = math.isfinite(self.logit_difference)
        return finite and not self.different and self.logit_difference <= self.limit

    def __str__(self) -> str:
        tensors = f"{self.num_tensors} tensors equal bit by bit"
        if self.different:
            tensors = f"{len(self.different)} of {self.num_tensors} tensors differ, first "
            tensors += self.different[0]
        verdict = "verified" if self.passed else "NOT THE SAME"
        logits = "not all logits are finite"
        if math.isfinite(self.logit_difference):
            logits = f"logits differ by {self.logit_difference:.1e} (limit {self.limit:.1e})"
        return f"{verdict}: {tensors}; {logits}"


def verify(
    *, mcore: str | Path, hf: str | Path, written: Literal["mcore", "hf"], prompts: Sequence[str]
) -> Comparison:
    """Compare a distributed checkpoint with a Hugging Face folder.

    Args:
        mcore: folder of the distributed checkpoint.
        hf: folder with weights, configuration and, for prompts, tokenizer.
        written: which of them is the output; numbers of the other are rounded to its dtypes.
        prompts: texts for the logits; none takes random tokens.

    Raises:
        UserError: if a prompt has fewer than two tokens.
    """
    config = load_hf_config(hf)
    params = stored_params(config)
    megatron, transformers = TorchDistSource(mcore), SafetensorsSource(CheckpointReader(hf))
    different = []
    for param in params:
        different += _different(param, megatron, transformers, written)
    embedding = params[0]
    dtype = megatron.dtype(embedding.key)
    if written == "hf":
        dtype = transformers.dtype(embedding.entry.mapping.sources[0].name)
    megatron.close()
    transformers.close()

    token_ids = _token_ids(hf, config, prompts)
    expected = _transformers_logits(hf, token_ids, dtype)
    found = _megatron_logits(Path(mcore), config, token_ids, dtype)
    largest = max(float(logits.abs().max()) for logits in expected)
    return Comparison(
        num_tensors=sum(len(param.entry.mapping.sources) for param in params),
        different=different,
        # `max` alone passes over a NaN that is not the first; that of tensors does not.
        logit_difference=float((torch.cat(found) - torch.cat(expected)).abs().max()),
        limit=TOLERANCE * max(1.0, largest),
    )


def _different(
    param: StoredParam, megatron: TorchDistSource, transformers: SafetensorsSource, written: str
) -> list[str]:
    whole = read_param(megatron, param, (0, param.shape[0]))
    names = []
    for name, tensor in to_hf(param.entry, [whole]).items():
        other = transformers.read(name)
        out, source = (other, tensor) if written == "hf" else (tensor, other)
        if bytes_of(source.to(out.dtype)) != bytes_of(out):
            names.append(name)
    return names


def _token_ids(hf: str | Path, config: PreTrainedConfig, prompts: Sequence[str]) -> list[list[int]]:
    if not prompts:
        generator = torch.Generator().manual_seed(0)
        length = min(_PROMPT_TOKENS, config.max_position_embeddings)
        shape = _NUM_PROMPTS, length
        return torch.randint(config.vocab_size, shape, generator=generator).tolist()
    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False)
    token_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, tokens in zip(prompts, token_ids, strict=True):
        require(len(tokens) > 1, "--prompt", prompt, "has fewer than two tokens")
    return token_ids


@torch.no_grad()
def _transformers_logits(
    hf: str | Path, token_ids: list[list[int]], dtype: torch.dtype
) -> list[Tensor]:
    """Return the logits [n - 1, vocab] float32 of every prompt but its last token."""
    model = build_reference(hf, dtype).float()
    return [model(torch.tensor([tokens])).logits[0, :-1] for tokens in token_ids]


def _megatron_logits(
    mcore: Path, hf_config: PreTrainedConfig, token_ids: list[list[int]], dtype: torch.dtype
) -> list[Tensor]:
    """Return the logits [n - 1, vocab] float32 of every prompt but its last token."""
    from mcore_rl.megatron import cpu, parallel
    from mcore_rl.megatron.checkpoint import load_model
    from mcore_rl.megatron.config import MegatronConfig
    from mcore_rl.megatron.forward_backward import forward_tokens
    from mcore_rl.megatron.model import build_chunks, build_transformer_config

    cpu.install()
    backend = collective_backend("cuda" if torch.cuda.is_available() else "cpu")
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    groups = parallel.initialize(Layout(), seed=0)
    megatron_config = MegatronConfig(dtype="float32", transformer_impl="local")
    config = build_transformer_config(hf_config, megatron_config, groups)
    (model,) = build_chunks(hf_config, config, groups, temperature=1.0)
    load_model(mcore, [model], groups)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.to(dtype))

    # The output layer gives log-probabilities of labels only, so its input is taken.
    hidden: list[Tensor] = []
    layer: Any = model.output_layer
    layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0].squeeze(1)))
    tied = model.share_embeddings_and_output_weights
    weight: Any = model.shared_embedding_or_output_weight() if tied else layer.weight
    for tokens in token_ids:
        sequence = TokenSequence(
            token_ids=np.array(tokens, np.int32), loss_mask=np.arange(len(tokens)) > 0
        )
        forward_tokens([model], [MicroBatch.of([sequence])], groups, weight.device)
    parallel.shut_down()
    dist.destroy_process_group()
    vocab = hf_config.vocab_size
    return [(rows @ weight.t())[:, :vocab].detach().cpu() for rows in hidden]
