"""A program of a fresh process: `cpu.install` where torch says that CUDA is present, what it leaves
and what it repairs as one line of JSON to stdout."""

import json

import torch


def main():
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from mcore_rl.megatron import cpu

    def untouched():
        return [
            torch.cuda.current_device,
            torch.cuda.Stream,
            mcore_random.CudaRNGStatesTracker,
            token_dispatcher.maybe_move_tensor_to_cpu,
        ]

    before = untouched()
    torch.cuda.is_available = lambda: True
    cpu.install()
    logits = moe_utils.router_gating_linear(
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.full((4, 3), 0.5, dtype=torch.bfloat16),
        None,
        torch.float32,
    )
    result = {
        "untouched": before == untouched(),
        "router_logits": logits.tolist(),
        "recomputes_in_fp8": mcore_random.CheckpointWithoutOutput().fp8,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
