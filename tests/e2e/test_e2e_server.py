"""Engines that are vLLM servers which run already: the same numbers as engines of our own."""

from __future__ import annotations

import pytest

from tests.e2e import commands
from tests.e2e.vllm_servers import VllmServer

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

STEPS = "trainer.total_training_steps=2"
SERVER = ("rollout.host=server", "rollout.kv_cache_memory_bytes=null")


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    made = VllmServer(files.model, tmp_path_factory.mktemp("server") / "log", max_model_len=32)
    yield made
    made.close()


def outcome(run_dir):
    """Return metrics, without the sizes of buckets, and weights of a run."""
    weights = commands.hash_files(run_dir / "hf_model")
    return commands.read_metrics(run_dir), {
        name: digest for name, digest in weights.items() if name.endswith(".safetensors")
    }


def test_a_server_gives_the_numbers_of_an_engine_of_our_own(files, prepared, server, tmp_path):
    """One run after the other on one server, which has another way of batching and one engine for
    the two inside: with one thread each, the samples and all that follows are equal bit by bit."""
    done = prepared.run(*files.argv(tmp_path / "inside", STEPS))
    assert done.returncode == 0, done.stderr
    server.wait()
    of_server = (*SERVER, f"rollout.server_urls=[{server.url}]")
    for transport in ("disk", "shared_memory"):
        run_dir = tmp_path / transport
        argv = (STEPS, *of_server, f"rollout.weight_transport={transport}")
        done = prepared.run(*files.argv(run_dir, *argv))
        assert done.returncode == 0, done.stderr
        assert outcome(run_dir) == outcome(tmp_path / "inside")


def test_a_server_for_another_run_is_refused_before_anything_is_trained(
    files, prepared, server, tmp_path
):
    server.wait()
    argv = files.argv(
        tmp_path / "run",
        *SERVER,
        f"rollout.server_urls=[{server.url}]",
        "rollout.tensor_model_parallel_size=2",
        "rollout.max_model_len=48",
    )
    done = prepared.run(*argv)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"the server {server.url} is not as the run wants it: max_model_len is 32" in line
    assert "it has 1 workers, not rollout.tensor_model_parallel_size=2" in line
    assert "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server" in line
