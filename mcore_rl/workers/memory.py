"""How much memory a worker's process holds at most during each call.

On CUDA: the used memory of the device, by this process or another one. It is the peak of the
tensors, plus the memory used outside torch's cache when the call began (the context, an engine that
is awake; minus the pages of a sleeping engine, which torch still counts). On CPU: the resident set,
minus its size before anything was built. If the kernel does not report it, nothing is measured.

Watching a call takes 0.1 ms on CPU, for a process of 0.5 GiB and of 8 GiB alike: the kernel only
resets a number, and walks no pages.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mcore_rl.workers.roles import Memory, MemoryUse


class Meter(Protocol):
    """Measures how much memory is held."""

    is_of_host: bool

    def begin(self) -> None:
        """Reset the peak."""
        ...

    def peak(self) -> int:
        """Return the most bytes since then."""
        ...

    def settled(self) -> int:
        """Return the bytes after freed memory has been given back."""
        ...


class ResidentSet:
    """Host memory of this process beyond its present size (proc(5), clear_refs and status)."""

    is_of_host = True

    def __init__(self) -> None:
        self._before = 0
        self._before = self.settled()
        self.begin()
        self.peak()  # if it cannot be read, this fails now and not in a run

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._status("VmHWM") - self._before

    def settled(self) -> int:
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
            trim(0)
        return self._status("VmRSS") - self._before

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (kib,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
        return int(kib) << 10


class CudaDevice:
    """Used memory of a device."""

    is_of_host = False

    def __init__(self, device: torch.device) -> None:
        self._device, self._beside = device, 0

    def begin(self) -> None:
        free, total = torch.cuda.mem_get_info(self._device)
        self._beside = total - free - torch.cuda.memory_reserved(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) + self._beside

    def settled(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def meter_of(device: torch.device) -> Meter | None:
    """Return the meter for a worker on `device`; None if its memory cannot be measured."""
    if device.type == "cuda":
        return CudaDevice(device)
    try:
        return ResidentSet()
    except (OSError, ValueError):  # no such files, or without such lines
        return None


class MemoryGauge(Memory):
    """Watches the calls of one process; make it before anything is built.

    Args:
        meter: None: nothing is measured.
    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._peaks: dict[Callable[..., Any], int] = {}
        self._lately = 0

    def memory_use(self) -> MemoryUse | None:
        """See `Memory`."""
        if self._meter is None:
            return None
        return MemoryUse(self._peaks, self._meter.settled(), self._meter.is_of_host)

    def take_peak(self) -> int | None:
        """See `Memory`."""
        peak, self._lately = self._lately, 0
        return peak if self._meter is not None else None

    def watched(
        self, handlers: Mapping[Callable[..., Any], Callable[..., Any]]
    ) -> Mapping[Callable[..., Any], Callable[..., Any]]:
        """Return the handlers, each of them watched."""
        if self._meter is None:
            return handlers
        meter = self._meter
        return {method: self._watch(meter, method, does) for method, does in handlers.items()}

    def _watch(
        self, meter: Meter, method: Callable[..., Any], handler: Callable[..., Any]
    ) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            meter.begin()
            answer = handler(*args)
            peak = meter.peak()
            self._peaks[method] = max(peak, self._peaks.get(method, peak))
            self._lately = max(self._lately, peak)
            return answer

        return watched
