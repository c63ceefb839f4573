"""What a process of `processes.py` does for the tests of a forward pass."""

from typing import Any

from tests.actor_cases import running_cluster
from tests.actor_inputs import ONE_MICRO_BATCH, random_sequences


def boundaries(spec):
    """Return (whether the four tensors of boundaries that the first attention is given are one
    object, the boundaries, the length that is said to be the longest)."""
    given = []
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        module: Any = worker.actor.chunks[0].module
        attention = module.decoder.layers[0].self_attention.core_attention
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["packed_seq_params"]), with_kwargs=True
        )
        cluster.trainer.logprobs(random_sequences(1, lengths=(9, 3, 14)))
    (params,) = given
    tensors = [
        params.cu_seqlens_q,
        params.cu_seqlens_kv,
        params.cu_seqlens_q_padded,
        params.cu_seqlens_kv_padded,
    ]
    is_one_object = all(tensor is tensors[0] for tensor in tensors)
    return is_one_object, tensors[0].tolist(), params.max_seqlen_q
