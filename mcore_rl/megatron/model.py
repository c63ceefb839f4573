"""Build the model: Megatron's GPTModel for a Hugging Face config, in a layout, with its weights.

`PolicyModel` differs from Megatron's GPTModel in one thing: its last stage returns
log-probabilities and entropy of the given labels, computed in chunks, instead of logits.

Parameters are addressed by their canonical name, with the global number of layer and expert
("decoder.layers.7.mlp.experts.local_experts.5.linear_fc1.weight"), whatever this rank holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from transformers import PreTrainedConfig

from mcore_rl.dtypes import torch_dtype
from mcore_rl.errors import require
from mcore_rl.megatron import dispatch, rotary
from mcore_rl.megatron.block_spec import block_spec, canonical_parameter_name, transformer_impl
from mcore_rl.megatron.config import MegatronConfig
from mcore_rl.megatron.logprobs import vocab_parallel_logprobs
from mcore_rl.megatron.overrides import KEY, PIPELINE_SPLITS, check_fields_exist
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.models.layout import layers_of_stages
from mcore_rl.models.mappings import ParamEntry, hf_shapes, to_megatron
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import model_family

Model = TypeVar("Model", bound=GPTModel)


@dataclass
class YarnTransformerConfig(TransformerConfig):
    """TransformerConfig with what GPTModel and SelfAttention look for under YaRN (gpt_model.py:172,
    attention.py:1102) and only the config of latent attention declares."""

    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True


def config_class(architecture: Mapping[str, Any]) -> type[TransformerConfig]:
    """Return the class of Megatron's config that has the arguments of a family."""
    if architecture.get("multi_latent_attention"):
        return MLATransformerConfig
    if "yarn_rotary_scaling_factor" in architecture:
        return YarnTransformerConfig
    return TransformerConfig


class LogprobLayer(ColumnParallelLinear):
    """The output layer of the vocabulary, giving log-probabilities of labels and no logits."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Tensor,
        weight: Tensor | None,
        labels_T: Tensor,
        temperature: float,
        vocab_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (logprobs_T, entropy_T or None) of `labels_T` [T] int64, both [T] float32.

        `hidden` is [T, 1, H], or this rank's part [T / tp, 1, H] under sequence parallelism;
        `weight` is the tied embedding, None for the layer's own.
        """
        group: Any = self.tp_group
        own_weight: Any = self.weight
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        elif group.size() > 1:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
        return vocab_parallel_logprobs(
            hidden.squeeze(1),
            own_weight if weight is None else weight,
            labels_T,
            temperature=temperature,
            vocab_size=vocab_size,
            group=group,
            with_entropy=with_entropy,
        )


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns log-probabilities and entropy.

    Args:
        temperature: logits are divided by it, as the rollout engine does.
        real_vocab_size: vocabulary without padding rows.
        kwargs: those of GPTModel.
    """

    def __init__(self, *, temperature: float, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature
        self.real_vocab_size = real_vocab_size
        if self.post_process:
            # GPTModel builds the layer itself and offers no argument for its class; the subclass
            # adds no state, only another forward. Its hooks (parameter gathering) keep working.
            self.output_layer.__class__ = LogprobLayer

    def _postprocess(self, hidden_states, *args, labels=None, extra_block_kwargs=None, **kwargs):
        """Replace GPTModel._postprocess: hidden states between stages, logprobs at the end."""
        if not self.post_process:
            return hidden_states
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return self.output_layer(
            hidden_states,
            weight,
            labels,
            temperature=self.temperature,
            vocab_size=self.real_vocab_size,
            with_entropy=self.with_entropy,
        )

    with_entropy: bool = True
    """Whether the last stage computes the entropy too; set by the caller before a pass."""


def build_transformer_config(
    hf_config: PreTrainedConfig, cfg: MegatronConfig, parallel: Parallel
) -> TransformerConfig:
    """Return Megatron's config of the model in this layout.

    Raises:
        UserError: if `override_transformer_config` names a field that does not exist, or
            `transformer_impl` what cannot run here.
    """
    layout = parallel.layout
    dtype = torch_dtype(cfg.dtype)
    impl = transformer_impl(cfg)
    fuses_activation = cfg.override_transformer_config.get("bias_activation_fusion", False)
    known = [field.name for field in fields(TransformerConfig)]
    check_fields_exist(cfg.override_transformer_config, known)
    settings = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": cfg.uses_sequence_parallel and layout.tp > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "transformer_impl": impl,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        # One row of packed tokens per micro-batch, of any length.
        "variable_seq_lengths": layout.pp > 1,
        # Interleaved stages hang or swap messages with any other pair (p2p_communication.py:185).
        "batch_p2p_comm": False,
        "overlap_p2p_comm": layout.vpp > 1,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        # RL optimizes its own objective. Balancing the experts belongs to pretraining, whatever
        # router_aux_loss_coef of the Hugging Face config says.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_router_bias_update_rate": 0.0,
        # The loss is a sum that finalize_model_grads divides once: see forward_backward.py.
        "calculate_per_token_loss": True,
        # Fusions off: rope and bias-activation fusions have caused logprob spikes in RL, and on
        # CPU they only cost compile time.
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "persist_layer_norm": False,
        "moe_permute_fusion": False,
        "moe_grouped_gemm": impl == "transformer_engine",
        # The local spec's module, whatever the name says.
        "use_te_activation_func": impl == "local" and not fuses_activation,
    }
    architecture = model_family(hf_config).transformer_kwargs(hf_config)
    if not cfg.override_transformer_config.keys() & PIPELINE_SPLITS:
        settings["pipeline_model_parallel_layout"] = _pipeline_layout(
            layers_of_stages(architecture["num_layers"], layout)
        )
    arguments = {**settings, **architecture, **cfg.override_transformer_config}
    return config_class(architecture)(**arguments)


def _pipeline_layout(layers: Sequence[int]) -> list[list[str]] | None:
    """Return what Megatron is told of unequal stages; None where it would divide them so itself."""
    if len(set(layers)) == 1:
        return None
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def build_chunks(
    hf_config: PreTrainedConfig, config: TransformerConfig, parallel: Parallel, temperature: float
) -> list[PolicyModel]:
    """Return this rank's chunks of the policy, weights not yet loaded."""
    policy = partial(PolicyModel, temperature=temperature, real_vocab_size=hf_config.vocab_size)
    return build_models(hf_config, config, parallel, policy)


def build_models(
    hf_config: PreTrainedConfig,
    config: TransformerConfig,
    parallel: Parallel,
    make: Callable[..., Model],
) -> list[Model]:
    """Return this rank's model chunks (one, or one per virtual stage), weights not yet loaded.

    Args:
        hf_config: of the checkpoint.
        config: Megatron's, in this layout.
        parallel: process groups.
        make: a GPTModel from the arguments of one.
    """
    rotary.install()
    dispatch.install()
    layout = parallel.layout
    family = model_family(hf_config)
    # [is the MLP of this layer a mixture of experts] over the whole model
    moe_layers: Any = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    chunks = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        chunk = make(
            config=config,
            transformer_layer_spec=block_spec(
                config, moe_layers, vp_stage, family.qk_norm(hf_config)
            ),
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            vp_stage=vp_stage,
            **family.gpt_kwargs(hf_config, layout.tp),
        )
        _mark_expert_parameters(chunk)
        chunks.append(chunk)
    return chunks


def _mark_expert_parameters(chunk: GPTModel) -> None:
    """Have expert gradients summed over the expert data-parallel group.

    Megatron marks experts only when EP > 1 (layers.py:829, 886, 1209), so with EP = 1 and
    ETP != TP their gradients are summed over the wrong ranks and training goes wrong silently.
    """
    for name, param in chunk.named_parameters():
        if ".experts." in name:
            param.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]


def freeze_routers(chunks: Sequence[GPTModel]) -> None:
    """Have training leave the routers as they are; call before `wrap_for_training`."""
    for chunk in chunks:
        for router in chunk.modules():
            if isinstance(router, TopKRouter):
                router.requires_grad_(False)


def wrap_for_training(
    chunks: Sequence[GPTModel], config: TransformerConfig, cfg: MegatronConfig
) -> list[DistributedDataParallel]:
    """Wrap the chunks with Megatron's gradient buffers and tell the schedule about them."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=cfg.overlap_grad_reduce,
        use_distributed_optimizer=cfg.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # a non-finite norm skips the update: optimizer.py
        average_in_collective=False,  # gradients are summed: forward_backward.py
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    schedule: Any = config  # where the schedule looks for these functions
    one = len(wrapped) == 1
    schedule.finalize_model_grads_func = finalize_model_grads
    schedule.no_sync_func = wrapped[0].no_sync if one else [w.no_sync for w in wrapped]
    if cfg.overlap_grad_reduce:
        starts = [w.start_grad_sync for w in wrapped]
        schedule.grad_sync_func = starts[0] if one else starts
    return wrapped


_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def named_local_parameters(chunks: Sequence[GPTModel], parallel: Parallel) -> dict[str, Tensor]:
    """Return this rank's parameters by canonical name, and the routers' biases, which are buffers.

    A tied output layer on a last stage that is not the first holds a copy of the embedding; it is
    listed under the embedding's name.
    """
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        biases = [item for item in chunk.named_buffers() if item[0].endswith(".expert_bias")]
        for local_name, param in [*chunk.named_parameters(), *biases]:
            name = canonical_name(local_name, chunk, parallel)
            if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            assert name not in found, f"two local parameters are called {name}"
            found[name] = param
    return found


def canonical_name(name_in_chunk: str, chunk: GPTModel, parallel: Parallel) -> str:
    """Return the name with global numbers of a parameter that the chunk itself calls so."""
    local_name = canonical_parameter_name(name_in_chunk)
    match = _LAYER.match(local_name)
    if not match:
        return local_name
    layer: Any = chunk.decoder.layers[int(match[1])]
    name = f"decoder.layers.{layer.layer_number - 1}.{local_name[match.end() :]}"
    if expert := _EXPERT.search(name):
        per_rank = (chunk.config.num_moe_experts or 0) // parallel.ep.size()
        number = parallel.ep.rank() * per_rank + int(expert[1])
        name = f"{name[: expert.start(1)]}{number}{name[expert.end(1) :]}"
    return name


def shard_group(entry: ParamEntry, parallel: Parallel) -> torch.distributed.ProcessGroup:
    """Return the group over which the parameter is cut: expert tensor or tensor parallel."""
    return parallel.etp if entry.is_expert else parallel.tp


def _check_all_are_held(params: Mapping[str, Tensor], entries: Sequence[ParamEntry]) -> None:
    """Raise a UserError unless every parameter of the model is held by some process: layers that a
    pipeline leaves out would be neither trained nor saved."""
    device = next(iter(params.values())).device
    is_here = torch.tensor(
        [entry.megatron_name in params for entry in entries], device=device
    ).int()
    torch.distributed.all_reduce(is_here, op=torch.distributed.ReduceOp.MAX)
    lost = [
        entry.megatron_name
        for entry, is_anywhere in zip(entries, is_here.tolist(), strict=True)
        if not is_anywhere
    ]
    require(
        not lost,
        KEY,
        "...",
        f"leaves {len(lost)} parameters of the model to no process, first {lost[:1]}",
        "Remove what divides the layers.",
    )


@torch.no_grad()
def load_weights(
    params: Mapping[str, Tensor],
    entries: Sequence[ParamEntry],
    reader: CheckpointReader,
    parallel: Parallel,
) -> None:
    """Fill the local parameters from a Hugging Face checkpoint, reading only their own slices;
    collective over all processes.

    Raises:
        AssertionError: if a local parameter has no entry or another shape than its entry makes.
        UserError: if the checkpoint lacks a tensor or holds one that is not finite, or no process
            holds a parameter of the model.
    """
    _check_all_are_held(params, entries)
    missing = dict(params)
    for entry in entries:
        param = missing.pop(entry.megatron_name, None)
        if param is None:
            continue  # another stage or expert rank holds it
        group = shard_group(entry, parallel)
        shard = to_megatron(entry, group.rank(), group.size(), reader.read)
        assert shard.shape == param.shape, (entry.megatron_name, shard.shape, param.shape)
        require(
            bool(shard.isfinite().all()),
            "checkpoint",
            str(reader.folder),
            f"holds infinities or NaN in {' or '.join(hf_shapes(entry))}",
        )
        param.copy_(shard)
    assert not missing, f"no mapping for {sorted(missing)}"
