"""Which line of the doctor explains the error of a library.

Used by the code that reports why a run did not start, and by the doctor for its own probes.
"""

from __future__ import annotations

import re

_LINE_OF_MODULE = {
    "amp_C": "apex",
    "apex": "apex",
    "flash_attn": "flash-attention",
    "megatron": "megatron-core",
    "ray": "ray",
    "torch": "torch",
    "torchaudio": "torchaudio",
    "torchcodec": "torchcodec",
    "torchvision": "torchvision",
    "transformer_engine": "transformer-engine",
    "transformers": "transformers",
    "vllm": "vllm",
}
_MODULES = "|".join(_LINE_OF_MODULE)
_IMPORTS = re.compile(
    rf"No module named '({_MODULES})\b"
    rf"|cannot import name '\w+' from (?:partially initialized module )?'({_MODULES})\b"
    rf"|module '({_MODULES})\b[\w.]*' has no attribute"
    r"|operator (torchvision|torchaudio)::"
    r"|\blib(torchvision|torchaudio|torchcodec)"
)
_AN_IMPORT = re.compile(r"\b(ImportError|ModuleNotFoundError): |undefined symbol")
_SYMPTOMS = (
    (r"megatron-core \S+ is not supported", "megatron-core"),
    (r"driver version is insufficient|no NVIDIA driver|driver on your system is too old", "driver"),
    (
        r"CUDA out of memory|CUDA error: out of memory|No available memory for the cache blocks"
        r"|desired GPU memory utilization|no kernel image is available",
        "device",
    ),
    (r"can't allocate memory|Cannot allocate memory|not enough memory: you tried", "memory"),
    (
        r"No space left on device.*/dev/shm|/dev/shm has \d+ MiB left|ended by SIGBUS|Bus error",
        "shared-memory",
    ),
    (r"No space left on device|Disk quota exceeded|Read-only file system", "disk"),
    (r"Too many open files", "open-files"),
    (r"EADDRINUSE|(?i:address already in use)", "port"),
    (
        r"Unable to find (address|interface)|[Nn]o socket interface|SOCKET_IFNAME"
        r"|unsupported gloo device|connectFullMesh",
        "interfaces",
    ),
    (
        r"Name or service not known|name resolution|[Cc]annot resolve|[Uu]nable to resolve",
        "host-name",
    ),
    (r"\bnccl[A-Z]\w+|NCCL error", "nccl"),
    (r"[Ee]ngine core initialization failed", "token"),
)


def line_of(failure: str) -> str:
    """Return the name of the doctor's line that explains the text of a failure; "": none does."""
    if found := _IMPORTS.search(failure):
        return _LINE_OF_MODULE[next(name for name in found.groups() if name)]
    return next((line for pattern, line in _SYMPTOMS if re.search(pattern, failure)), "")


def hint(failure: str) -> str:
    """Return "; mcore-rl doctor LINE says more" where a line explains the failure, the same without
    a line where it is an import, or ""."""
    line = line_of(failure)
    if line:
        return f"; mcore-rl doctor {line} says more"
    return "; mcore-rl doctor says more" if _AN_IMPORT.search(failure) else ""
