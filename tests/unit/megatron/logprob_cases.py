"""Log-probabilities over a vocabulary that is cut over processes."""

import torch.distributed as dist

from mcore_rl.megatron.logprobs import vocab_parallel_logprobs


def sharded_logprobs(hidden_TH, weight_VH, labels_T, weights_T2, vocab_size):
    """Return this rank's (logprobs, entropy, gradient of hidden, gradient of its weight rows) for
    the loss that `weights_T2` makes of logprobs and entropy; `weight_VH` has the padding rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden = hidden_TH.clone().requires_grad_()
    shard = weight_VH.chunk(size)[rank].clone().requires_grad_()
    logprobs_T, entropy_T = vocab_parallel_logprobs(
        hidden,
        shard,
        labels_T,
        vocab_size=vocab_size,
        group=dist.group.WORLD,
        with_entropy=True,
        temperature=1.4,
        block_logits=60,
    )
    assert entropy_T is not None
    (weights_T2[:, 0] @ logprobs_T + weights_T2[:, 1] @ entropy_T).backward()
    return logprobs_T.detach(), entropy_T.detach(), hidden.grad, shard.grad
