"""Every call that the CUDA transports make into vLLM, held against the installed vLLM.

No device is needed: what is called is replaced by something that binds the arguments to the real
signature. Says nothing of what arrives; that is for a machine with a device.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mcore_rl" / "weight_sync"

BIND = """
import ast, importlib, inspect, pathlib, sys
tree = ast.parse(pathlib.Path(sys.argv[1]).read_text())
real = {
    alias.asname or alias.name: getattr(importlib.import_module(node.module), alias.name)
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm")
    for alias in node.names
}
called = set()
for node in ast.walk(tree):
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in real:
        keywords = {keyword.arg: None for keyword in node.keywords}
        inspect.signature(real[node.func.id]).bind(*[None] * len(node.args), **keywords)
        called.add(node.func.id)
assert called == set(real), set(real) - called
print(*sorted(called))
"""


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("ipc", "PackedBufferImporter packed_ipc_consumer packed_ipc_producer"),
        (
            "nccl",
            "packed_nccl_broadcast_consumer packed_nccl_broadcast_producer"
            " stateless_init_process_group",
        ),
    ],
)
def test_calls_into_vllm_bind_to_its_signatures(name, called):
    command = [sys.executable, "-c", BIND, str(PACKAGE / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == called.split()


ATTRIBUTES = """
import dataclasses, inspect
import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter, PackedIpcChunk
from mcore_rl.weight_sync.ipc import InDeviceBuffer
inspect.signature(PyNcclCommunicator.destroy).bind(None)
inspect.signature(PackedBufferImporter.close).bind(None)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
inspect.signature(RoutedExperts.load_weights).bind(None, [])
inspect.signature(RoutedExperts.get_expert_mapping).bind(None)
info = vars(get_layerwise_info(torch.nn.Linear(1, 1)))
assert {"kernel_tensors", "loaded_weights"} <= set(info), info
ours = [field.name for field in dataclasses.fields(InDeviceBuffer)]
assert ours == [field.name for field in dataclasses.fields(PackedIpcChunk)], ours
"""


def test_what_is_read_of_vllm_s_objects_is_there():
    command = [sys.executable, "-c", ATTRIBUTES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
