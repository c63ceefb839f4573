"""Run Megatron-Core on a machine without CUDA, Transformer Engine and Apex.

Everything that this needs is in this file. Where CUDA is present `install` repairs only what the
absence of Transformer Engine breaks there too. Each repair replaces one name and first checks that
the name is still there, so another version of Megatron-Core fails here with a sentence and not
later with wrong numbers. Remove an entry when the named upstream line is fixed. `versions.py` has
the versions it is tested with.

What is replaced (line numbers of 0.16.1, relative to megatron/core):

1. `torch.cuda` calls that raise without CUDA: devices, streams, events.
2. The random state tracker (tensor_parallel/random.py): forks the CPU generator.
3. Literal `device="cuda"`, `.cuda()` and `.type()` string tests: a module-level stand-in for
   `torch` in four modules, and a function mode that is entered only inside the optimizer and where
   tied embeddings are set up.
4. Defects: two that show without Transformer Engine on any device, and three on the host.
5. Adam: shaped like the fused Adam that the checkpoint code of the optimizer expects.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adam import adam
from torch.overrides import TorchFunctionMode

from mcore_rl.megatron.versions import require_supported_megatron

_CPU = torch.device("cpu")
_installed = _repaired = False


def install() -> None:
    """Make Megatron-Core usable without CUDA, and on it without Transformer Engine.

    Raises:
        RuntimeError: if the installed Megatron-Core is not supported (on CUDA too) or a repaired
            name is gone.
    """
    global _installed, _repaired
    require_supported_megatron()
    if not _repaired:
        _repair_missing_transformer_engine()
        _repaired = True
    if _installed or torch.cuda.is_available():
        return
    _answer_cuda_calls()
    _track_random_states_on_cpu()
    _redirect_device_literals()
    _enter_mode_inside_optimizer()
    _enter_mode_where_embeddings_are_tied()
    _leave_splits_on_host()
    _repair_unequal_collectives()
    _spare_a_single_rank_its_copies()
    _use_group_step_adam()
    _installed = True


def _replace(owner: str, name: str, new: Any) -> None:
    """Replace `name` of module or class `owner` ("megatron.core.x" or "megatron.core.x:Class")."""
    module_name, _, class_name = owner.partition(":")
    target = importlib.import_module(module_name)
    if class_name:
        target = getattr(target, class_name)
    if not hasattr(target, name):
        raise RuntimeError(f"{owner}.{name} is gone: mcore_rl/megatron/cpu.py needs an update")
    setattr(target, name, new)


# ------------------------------------------------------------------ 1. torch.cuda without CUDA


class _OrderedWork:
    """Stands in for a CUDA stream or event: CPU work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _OrderedWork:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def record_event(self, *args: Any) -> _OrderedWork:
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record = wait = synchronize = _nothing


def _answer_cuda_calls() -> None:
    """Give `torch.cuda` answers where it could only raise (schedules, p2p, dispatcher, DDP)."""
    work = _OrderedWork()
    for name, answer in {
        "current_device": _CPU,
        "synchronize": None,
        "empty_cache": None,
        "set_device": None,
        "current_stream": work,
        "default_stream": work,
        "stream": work,
    }.items():
        _replace("torch.cuda", name, lambda *args, _answer=answer, **kwargs: _answer)
    _replace("torch.cuda", "Stream", _OrderedWork)
    _replace("torch.cuda", "Event", _OrderedWork)


# ------------------------------------------------------------------ 2. random states


def _track_random_states_on_cpu() -> None:
    """Let the tracker keep CPU generator states (random.py:55, 104, 235)."""
    from megatron.core.tensor_parallel import random as mcore_random

    class CpuRandomStatesTracker(mcore_random.CudaRNGStatesTracker):
        """Named CPU generator states.

        `fork` is rewritten and not inherited: the base class restores the CPU state around the
        body, so every fork would draw the same numbers again.
        """

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} or seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME):
            outer_state, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer_state)
                self._current_state_name = outer_name

    module = "megatron.core.tensor_parallel.random"
    _replace(module, "CudaRNGStatesTracker", CpuRandomStatesTracker)
    _replace(module, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(
        module, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    )


# ------------------------------------------------------------------ 3. literal CUDA devices


class _TorchWithCpuFactories:
    """`torch` as one Megatron module sees it: the named factories make CPU tensors."""

    def __init__(self, *factories: str) -> None:
        for name in factories:
            setattr(self, name, functools.partial(self._make, getattr(torch, name)))

    @staticmethod
    def _make(factory: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return factory(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _redirect_device_literals() -> None:
    """Literal `device="cuda"` in schedules.py:286, moe_utils.py:998, utils.py:35, saver:204."""
    for module in (
        "megatron.core.pipeline_parallel.schedules",
        "megatron.core.transformer.moe.moe_utils",
        "megatron.core.transformer.utils",
    ):
        _replace(module, "torch", _TorchWithCpuFactories("zeros", "ones"))
    _replace(
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "torch",
        _TorchWithCpuFactories("tensor"),
    )


class CudaMeansCpu(TorchFunctionMode):
    """Inside, `device="cuda"` makes CPU tensors, `.cuda()` returns the tensor itself and
    `.type()` answers with the CUDA name that Megatron compares with."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return func(*args, **kwargs)


def _under_mode(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with CudaMeansCpu():
            return method(*args, **kwargs)

    return wrapped


def _enter_mode_inside_optimizer() -> None:
    """Enter the mode in optimizer methods (optimizer.py:375, 473, 671; distrib_optimizer.py:361;
    clip_grads.py:90), not everywhere: as a process-wide mode it costs about a tenth of a step."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    entry_points = (
        "__init__",
        "prepare_grads",
        "get_grad_norm",
        "step",
        "step_with_ready_grads",
        "sharded_state_dict",
        "load_state_dict",
        "reload_model_params",
        "offload_to_cpu",
        "restore_from_cpu",
    )
    for cls in (
        optimizer.MegatronOptimizer,
        optimizer.MixedPrecisionOptimizer,
        optimizer.Float16OptimizerWithFloat16Params,
        optimizer.FP32Optimizer,
        optimizer.ChainedOptimizer,
        distrib_optimizer.DistributedOptimizer,
    ):
        for name in entry_points:
            method = cls.__dict__.get(name)
            if inspect.isfunction(method) and not getattr(method, "__isabstractmethod__", False):
                setattr(cls, name, _under_mode(method))


def _enter_mode_where_embeddings_are_tied() -> None:
    """`.cuda()` where the first and last stage agree on tied weights (language_module.py:244)."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    name = "setup_embeddings_and_output_layer"
    _replace(
        "megatron.core.models.common.language_module.language_module:LanguageModule",
        name,
        _under_mode(getattr(LanguageModule, name)),
    )


# ------------------------------------------------------------------ 4. defects


def _repair_missing_transformer_engine() -> None:
    """Names that only its presence sets, and a default that needs it."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import moe_utils

    if HAVE_TE:
        return
    # moe_utils.py:1192 reads te_general_gemm, which the except branch at :37 never defines.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]

    # random.py:629 says `self.fp8 = fp8 is not None`: the default False counts as True.
    original_init: Any = mcore_random.CheckpointWithoutOutput.__init__

    def init_without_fp8(self, fp8: Any = None):
        original_init(self, fp8 or None)

    _replace(
        "megatron.core.tensor_parallel.random:CheckpointWithoutOutput", "__init__", init_without_fp8
    )


def _leave_splits_on_host() -> None:
    """moe_utils.py:1093 turns only CUDA tensors to numbers; all_to_all_single wants numbers."""

    def splits_to_host(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        splits_to_host,
    )


def _repair_unequal_collectives() -> None:
    """gloo gathers and scatters equal parts only (mappings.py:150, 198); ETP with EP needs
    unequal ones: gather padded parts and cut, reduce everything and slice."""
    from megatron.core.tensor_parallel import mappings

    equal_gather = mappings._gather_along_first_dim
    equal_scatter = mappings._reduce_scatter_along_first_dim

    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return equal_gather(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        gathered = input_.new_empty((group.size() * max(sizes), *input_.shape[1:]))
        dist.all_gather_into_tensor(gathered, padded, group=group)
        parts = gathered.chunk(group.size())
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return equal_scatter(input_, group, input_split_sizes, use_global_buffer)
        summed = input_.contiguous().clone()
        dist.all_reduce(summed, group=group)
        sizes = [int(size) for size in input_split_sizes]
        return summed.split(sizes)[group.rank()].contiguous()

    module = "megatron.core.tensor_parallel.mappings"
    _replace(module, "_gather_along_first_dim", gather)
    _replace(module, "_reduce_scatter_along_first_dim", scatter)


def _spare_a_single_rank_its_copies() -> None:
    """With one rank, a reduce-scatter of gradients and an all-gather of parameters write a buffer
    onto itself (param_and_grad_buffer.py:274, 433). gloo copies it several times, in a thread of
    its own."""
    name = "megatron.core.distributed.param_and_grad_buffer"
    module: Any = importlib.import_module(name)
    coalescing_manager = module._coalescing_manager

    @contextlib.contextmanager
    def several_ranks_only(group, async_ops=False):
        if group.size() == 1:
            yield _OrderedWork()
        else:
            with coalescing_manager(group, async_ops=async_ops) as work:
                yield work

    def skipped_with_one_rank(collective):
        def call(output, input_, *, group, **options):
            # Another memory: the collective has work to do.
            if group.size() == 1 and output.data_ptr() == input_.data_ptr():
                return None
            return collective(output, input_, group=group, **options)

        return call

    _replace(name, "_coalescing_manager", several_ranks_only)
    for collective in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        _replace(name, collective, skipped_with_one_rank(getattr(module, collective)))


# ------------------------------------------------------------------ 5. Adam


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW whose `step` is a number of the parameter group, as in the fused CUDA Adams.

    The optimizer's checkpoint code is written for that shape; with torch's own Adam (a `step`
    tensor per parameter) loading fails (distrib_optimizer.py:641, :940). The update itself is
    torch's fused CPU kernel.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one AdamW step on every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            # The kernel adds one to the counters it is given.
            steps = [torch.tensor(float(group["step"] - 1)) for _ in params]
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )


def _use_group_step_adam() -> None:
    """Tell Megatron that the fused kind of Adam is there (distrib_optimizer.py:514)."""
    _replace("megatron.core.optimizer", "Adam", GroupStepAdam)
    _replace("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", False)
    _replace("megatron.core.optimizer.distrib_optimizer", "Adam", GroupStepAdam)
    _replace("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", True)
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    module.USING_APEX_OPTIMIZER = True  # pyright: ignore[reportAttributeAccessIssue]
