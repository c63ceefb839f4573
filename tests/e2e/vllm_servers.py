"""vLLM servers of the tests, as a user starts them."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from mcore_rl.models.spec import engine_overrides
from mcore_rl.processes import kill
from mcore_rl.rollout.base import EngineSpec, RolloutConfig
from mcore_rl.rollout.hosts.server import server_command
from mcore_rl.weight_sync.base import Link

START_LIMIT_S = 300.0


class VllmServer:
    """A server for the model of a folder.

    Args:
        folder: of the model, whose weights it does not read.
        log: file.
        max_model_len: longest prompt and response.
        num_ranks: of tensor parallelism.
    """

    def __init__(self, folder: Path, log: Path, max_model_len: int, num_ranks: int = 1) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        spec = EngineSpec(
            model_path=str(folder),
            dtype="float32",
            max_model_len=max_model_len,
            stop_token_ids=[],
            config=RolloutConfig(host="server", server_urls=[self.url]),
            run_folder="",
            config_overrides=engine_overrides(str(folder)),
        )
        link = Link(
            transport="disk", run_folder="", engine=0, engine_rank=0, num_receivers=num_ranks
        )
        # On CPU: what the engines of the other hosts have by themselves.
        of_cpu = {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_MLA_DISABLE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        mode, python, *words = shlex.split(server_command(spec, link))
        assert (mode, python) == ("VLLM_SERVER_DEV_MODE=1", "python")
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)),
                    *("--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)),
                    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"),
                    "--disable-log-stats",
                ],
                env=os.environ | of_cpu | {"VLLM_SERVER_DEV_MODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def wait(self) -> None:
        """Return when it is up."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def close(self) -> None:
        """End it with all its processes."""
        if self._process.poll() is not None:
            return
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            kill([self._process])
        for child in children:
            if child.is_running():
                child.kill()
