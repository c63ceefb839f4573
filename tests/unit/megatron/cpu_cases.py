"""What the processes do in test_megatron_cpu: each returns what a CPU-only Megatron then does."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.megatron import cpu


def replaced_names():
    """Install twice; return how often each kind of name was replaced by the second time (0)."""
    cpu.install()

    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings, random

    def snapshot():
        return [
            torch.cuda.current_device,
            torch.cuda.Stream,
            random.CudaRNGStatesTracker,
            random.CheckpointWithoutOutput.__init__,
            schedules.torch,
            distrib_optimizer.DistributedOptimizer.__init__,
            distrib_optimizer.Adam,
            mappings._gather_along_first_dim,
            LanguageModule.setup_embeddings_and_output_layer,
        ]

    first = snapshot()
    cpu.install()
    return [old is not new for old, new in zip(first, snapshot(), strict=True)]


def cuda_answers():
    """Use streams, events and the current device as Megatron does; return the tensor's device."""
    cpu.install()
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = torch.ones(2, device=torch.cuda.current_device())
        event.record(stream)
    event.synchronize()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.synchronize()
    return made.device.type, event.query(), torch.cuda.is_available()


def device_literals():
    """Return the devices of what four modules make with device="cuda", by module."""
    cpu.install()
    from megatron.core.dist_checkpointing.strategies import state_dict_saver
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer import utils
    from megatron.core.transformer.moe import moe_utils

    made = {
        "schedules": schedules.torch.zeros(2, device="cuda"),
        "moe_utils": moe_utils.torch.ones(2, device="cuda"),
        "utils": utils.torch.ones((2, 2), device="cuda", dtype=torch.bool),
        "saver": state_dict_saver.torch.tensor([1], device="cuda"),
    }
    others = schedules.torch.Tensor is Tensor and schedules.torch.float32 is torch.float32
    return {name: tensor.device.type for name, tensor in made.items()}, others


def draws_of_forks():
    """Return what two forks, the outer generator and forks after the same seed draw."""
    cpu.install()
    from megatron.core.tensor_parallel import random

    def draw():
        return torch.rand(3).tolist()

    tracker = random.CudaRNGStatesTracker()
    tracker.add("inner", 7)
    torch.manual_seed(3)
    outer_alone = [draw(), draw()]
    torch.manual_seed(3)
    outer = [draw()]
    with tracker.fork("inner"):
        inner = [draw()]
    with tracker.fork("inner"):
        inner.append(draw())
    outer.append(draw())
    again = random.CudaRNGStatesTracker()
    again.add("inner", 7)
    with again.fork("inner"):
        repeated = draw() + draw()
    return outer_alone, outer, inner, repeated


def nested_and_interrupted_forks():
    """Return whether states survive a fork inside a fork and an exception inside one."""
    cpu.install()
    from megatron.core.tensor_parallel import random

    def sequence(interrupted):
        tracker = random.CudaRNGStatesTracker()
        tracker.add("a", 1)
        tracker.add("b", 2)
        torch.manual_seed(0)
        drawn = []
        with tracker.fork("a"):
            drawn.append(torch.rand(1).item())
            if interrupted:
                with tracker.fork("b"):
                    torch.rand(5)
            drawn.append(torch.rand(1).item())
        try:
            with tracker.fork("b"):
                if interrupted:
                    raise KeyError
        except KeyError:
            pass
        drawn.append(torch.rand(1).item())
        return drawn

    return sequence(False), sequence(True)


def recompute_with_dropout():
    """Return the gradients of a dropout, plain and recomputed by Megatron's checkpoint."""
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(5)
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(11)
        x = torch.ones(64, requires_grad=True)

        def layer(x):
            return torch.nn.functional.dropout(x, 0.5)

        y = tensor_parallel.checkpoint(layer, False, x) if recomputed else layer(x)
        torch.rand(9)  # the generator moves on before the backward pass
        y.sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.tolist())
    parallel_state.destroy_model_parallel()
    return gradients


def function_mode():
    """Return what `CudaMeansCpu` makes of devices, `.cuda()` and `.type()`, inside and after."""
    x = torch.ones(2)
    with cpu.CudaMeansCpu():
        inside = {
            "factory": torch.zeros(2, device="cuda").device.type,
            "index": torch.zeros(2, device=torch.device("cuda", 0)).device.type,
            "to": x.to(device="cuda").device.type,
            "same": x.cuda() is x,
            "float": x.type(),
            "bfloat16": x.bfloat16().type(),
            "cast": x.type(torch.float64).dtype == torch.float64,
            "cpu": torch.zeros(2, device="cpu").device.type,
        }
    return inside, x.type()


def adam_states(steps):
    """Return parameters and moments of GroupStepAdam and of torch's AdamW after equal steps.

    The second of two groups has its own rate and no decay; a third parameter has no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(17, 5, generator=generator), torch.randn(9, generator=generator)]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(steps)]

    def run(make):
        params = [torch.nn.Parameter(p.clone()) for p in (*start, torch.ones(3))]
        groups = [
            {"params": [params[0], params[2]]},
            {"params": [params[1]], "lr": 0.03, "weight_decay": 0.0},
        ]
        optimizer = make(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        for step in gradients:
            for param, gradient in zip(params, step, strict=False):
                param.grad = gradient.clone()
            optimizer.step()
        moments = [optimizer.state[p][key] for p in params[:2] for key in ("exp_avg", "exp_avg_sq")]
        return [p.detach() for p in params], moments, optimizer

    ours, our_moments, optimizer = run(cpu.GroupStepAdam)
    theirs, their_moments, _ = run(torch.optim.AdamW)
    shape = {
        "steps": [group["step"] for group in optimizer.param_groups],
        "state": sorted(optimizer.state[optimizer.param_groups[0]["params"][0]]),
    }
    return ours + our_moments, theirs + their_moments, shape


def repaired_defects():
    """Return what the four repaired names do."""
    cpu.install()
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    splits = torch.tensor([1, 2])
    nothing: Any = None
    return {
        "general_gemm": moe_utils.te_general_gemm,
        "fp8": CheckpointWithoutOutput().fp8,
        "numbers": isinstance(
            token_dispatcher.maybe_move_tensor_to_cpu(splits, as_numpy=True), np.ndarray
        ),
        "tensor": token_dispatcher.maybe_move_tensor_to_cpu(splits) is splits,
        "nothing": token_dispatcher.maybe_move_tensor_to_cpu(nothing, as_numpy=True),
        "adam": distrib_optimizer.Adam is cpu.GroupStepAdam,
    }


def unequal_collectives(sizes):
    """Gather parts of unequal sizes and scatter a sum into them; return both."""
    cpu.install()
    from megatron.core.tensor_parallel import mappings

    rank = dist.get_rank()
    group = dist.group.WORLD
    part = torch.arange(sizes[rank] * 3).view(-1, 3).float() + 100 * rank
    whole = torch.arange(sum(sizes) * 3).view(-1, 3).float() * (rank + 1)
    kept = whole.clone()
    gathered = mappings._gather_along_first_dim(part, group, sizes)
    scattered = mappings._reduce_scatter_along_first_dim(whole, group, sizes)
    assert torch.equal(whole, kept), "the input is changed"
    return part, gathered, scattered


def buffers_of_a_step():
    """Sum gradients and gather parameters as a step does; return (this rank's part of the sum, all
    parameters, whether each was left to the group)."""
    cpu.install()
    from megatron.core.distributed import param_and_grad_buffer

    module: Any = param_and_grad_buffer
    group: Any = dist.group.WORLD
    rank, size = group.rank(), group.size()
    gradients = torch.arange(4.0) + rank
    part = gradients.chunk(size)[rank]
    with module._coalescing_manager(group, async_ops=True) as reduced:
        module.dist_reduce_scatter_func(part, gradients, group=group, async_op=True)
    reduced.wait()
    parameters = torch.arange(4.0) * (rank + 1)
    with module._coalescing_manager(group, async_ops=True) as gathered:
        part_of = parameters.chunk(size)[rank]
        module.dist_all_gather_func(parameters, part_of, group=group, async_op=True)
    gathered.wait()
    return part, parameters, [hasattr(work, "works") for work in (reduced, gathered)]
