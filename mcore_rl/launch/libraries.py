"""The environment variables that libraries read when they are imported."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Keep libraries off the network and off the terminal; children inherit it."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's overlap relies on it
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # until its own configuration is read
    # Megatron warns at each import that Apex and Transformer Engine are absent, and torch warns
    # about renamed collectives that Megatron calls. A user can fix neither.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|vllm)\.")
