"""An engine behind HTTP: what it asks of a server, and what it says of one that fails.

The server here is a small one of our own that does what it is told; `tests/e2e/test_e2e_server.py`
has vLLM's.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from mcore_rl.errors import RolloutError, UserError, WeightSyncError
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, RolloutConfig, SamplingParams
from mcore_rl.rollout.hosts.server import ServerEngine, check_server, server_command
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.disk import InFile

GOOD = {
    "model_config": {
        "model": "elsewhere",
        "dtype": "torch.float32",
        "max_model_len": 64,
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,
        "hf_overrides": {},
    },
    "parallel_config": {
        "world_size": 1,
        "data_parallel_size": 1,
        "worker_extension_cls": "mcore_rl.rollout.vllm_worker.WorkerExtension",
    },
    "weight_transfer_config": {"backend": "linked"},
}


class Server:
    """Answers by path with what `answers` has; a list of chunks is streamed, the number in between
    is a pause in seconds, an exception cuts the connection."""

    def __init__(self):
        self.answers = {
            "/health": {},
            "/server_info": {"vllm_config": GOOD},
            "/reset_prefix_cache": {"success": True},
        }
        self.asked = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply({})

            def do_POST(self):
                size = int(self.headers.get("Content-Length", 0))
                self.reply(json.loads(self.rfile.read(size) or b"{}"))

            def reply(self, body):
                path = self.path.partition("?")[0]
                outer.asked.append((self.path, body))
                answer = outer.answers.get(path, {})
                if path == "/collective_rpc":
                    answer = outer.answers.get(body["method"], {"results": [[]]})
                if isinstance(answer, int):
                    self.send_error(answer)
                elif isinstance(answer, list):
                    self.stream(answer)
                else:
                    self.send(json.dumps(answer).encode())

            def send(self, text):
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def stream(self, chunks):
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                for chunk in chunks:
                    if isinstance(chunk, float):
                        time.sleep(chunk)
                        continue
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    self.wfile.flush()
                self.close_connection = True

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def paths(self):
        return [body["method"] if path == "/collective_rpc" else path for path, body in self.asked]


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def spec_of(url, **fields):
    config = RolloutConfig(host="server", server_urls=[url], **fields)
    return EngineSpec(
        model_path="/models/tiny",
        dtype="float32",
        max_model_len=48,
        stop_token_ids=[0],
        config=config,
        run_folder="",
        url=url,
    )


def link_of(spec):
    size = spec.config.tensor_model_parallel_size
    return Link(transport="disk", run_folder="r", engine=0, engine_rank=0, num_receivers=size)


@pytest.fixture
def engine(server):
    spec = spec_of(server.url)
    made = ServerEngine(spec, link_of(spec))
    server.asked.clear()
    yield made
    made.close()


def chunk(tokens, logprobs, finish_reason=None, spans=None):
    content = [{"token_id": t, "logprob": x} for t, x in zip(tokens, logprobs, strict=True)]
    choice = {
        "index": 0,
        "token_ids": tokens,
        "logprobs": {"content": content},
        "finish_reason": finish_reason,
    }
    if spans:
        choice["weight_versions"] = [
            {"version": version, "start": start, "end": end} for version, start, end in spans
        ]
    return {"choices": [choice]}


REQUEST = GenerationRequest(
    prompt_token_ids=np.array([3, 4], np.int32),
    sampling=SamplingParams(temperature=0.7, top_p=1.0, top_k=-1, max_tokens=5, seed=9),
)


def drawn(engine):
    ended = []
    while not ended:
        ended = engine.step()
    return ended


def test_tokens_come_as_they_are_drawn_with_exact_logprobs_and_their_versions(server, engine):
    exact = float(torch.tensor(-1.2345678).item())
    server.answers["/inference/v1/generate"] = [
        chunk([5], [exact]),
        0.05,
        chunk([6, 0], [-0.5, -2.0], "stop", [("3", 0, 1), ("4", 1, 3)]),
    ]
    engine.add(7, REQUEST)
    assert engine.step() == []  # something was drawn, and the request goes on
    ((number, result),) = drawn(engine)
    assert (number, result.token_ids.tolist(), result.finish_reason) == (7, [5, 6, 0], "stop")
    assert result.logprobs.tolist() == [exact, -0.5, -2.0]
    assert [(s.version, s.start, s.end) for s in result.versions] == [(3, 0, 1), (4, 1, 3)]
    ((path, body),) = server.asked
    assert path == "/inference/v1/generate"
    assert body["token_ids"] == [3, 4]
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 5,
        "seed": 9,
        "stop_token_ids": [0],
        "stop": [],
        "detokenize": False,
        "ignore_eos": True,
        "logprobs": 0,
    }


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (500, "broke off a response: .*HTTP 500"),
        ([chunk([5], [-1.0])], "broke off a response: .*the response has no end"),
        ([{"error": {"message": "no memory"}}], "broke off a response: .*no memory"),
        ([{"choices": [{"finish_reason": "stop"}]}], "answered what cannot be read"),
        (
            [{"choices": [{**chunk([5], [-1.0])["choices"][0], "token_ids": [6]}]}],
            "answered what cannot be read: tokens and log-probabilities do not belong together",
        ),
    ],
)
def test_a_server_that_fails_or_answers_garbage_is_named(server, engine, answer, said):
    server.answers["/inference/v1/generate"] = answer
    engine.weight_version = 3
    engine.add(0, REQUEST)
    with pytest.raises(RolloutError, match=f"the server {server.url} {said}"):
        drawn(engine)


def test_an_abort_brings_what_was_drawn(server, engine):
    server.answers["/inference/v1/generate"] = [
        chunk([5], [-1.0]),
        0.1,
        chunk([], [], "abort", [("3", 0, 1)]),
    ]
    engine.add(0, REQUEST)
    ((number, result),) = engine.abort([0])
    assert (number, result.token_ids.tolist(), result.finish_reason) == (0, [5], "abort")
    (names,) = [body["request_ids"] for path, body in server.asked if path == "/abort_requests"]
    (asked,) = [b["request_id"] for path, b in server.asked if path == "/inference/v1/generate"]
    assert names == [f"generate-tokens-{asked}"]  # as the server calls it


def test_an_update_is_handed_on_in_order_between_a_pause_and_a_resume(server, engine):
    manifest = Manifest()
    manifest.add([("w", torch.arange(3.0))])
    engine.start_weight_update(4, with_digests=True)
    engine.update_weights(InFile("r/0.safetensors"))
    engine.finish_weight_update(manifest)
    assert engine.weight_version == 4
    assert server.paths() == [
        "/pause?mode=keep",
        "begin_intake",
        "/start_weight_update",
        "/update_weights",
        "differences_from_json",
        "/finish_weight_update",
        "/reset_prefix_cache?reset_running_requests=true",
        "/resume",
    ]
    bodies = dict(zip(server.paths(), [body for _, body in server.asked], strict=True))
    assert bodies["begin_intake"]["args"] == [4, True]
    assert bodies["/update_weights"] == {"update_info": {"update": {"path": "r/0.safetensors"}}}
    assert bodies["/finish_weight_update"] == {"weight_version": "4"}
    (text,) = bodies["differences_from_json"]["args"]
    assert manifest.differences(Manifest.from_json(text)) == []


def test_a_manifest_comes_through_json_as_it_is():
    manifest, other = Manifest(), Manifest()
    manifest.add([("w", torch.randn(65, generator=torch.Generator().manual_seed(1)))] * 2)
    other.add([("w", torch.randn(65, generator=torch.Generator().manual_seed(2)))])
    again = Manifest.from_json(manifest.to_json())
    assert again.differences(other) == manifest.differences(other)
    assert again.to_json() == manifest.to_json()


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        (
            "differences_from_json",
            {"results": [["w did not arrive"]]},
            "4 are not what was sent: w",
        ),
        ("/update_weights", 500, "did not do /update_weights: HTTP 500"),
        ("/reset_prefix_cache", {"success": False}, "kept keys and values of other weights"),
    ],
)
def test_an_update_that_fails_leaves_a_server_without_weights(server, engine, path, answer, said):
    server.answers[path] = answer
    engine.start_weight_update(4)

    def update():
        engine.update_weights(InFile("r/0.safetensors"))
        engine.finish_weight_update(Manifest())

    with pytest.raises(WeightSyncError, match=said):
        update()
    engine.abort_weight_update()
    assert engine.weight_version == -1
    assert server.paths()[-1] == "abort_intake"  # it stays paused


@pytest.mark.parametrize(
    ("section", "field", "value", "said"),
    [
        ("model_config", "dtype", "torch.bfloat16", "dtype is torch.bfloat16"),
        ("model_config", "max_model_len", 32, "max_model_len is 32, less than 48"),
        ("model_config", "logprobs_mode", "raw_logprobs", "logprobs_mode is raw_logprobs"),
        ("parallel_config", "world_size", 2, "it has 2 workers, not rollout.tensor_model_parallel"),
        ("parallel_config", "data_parallel_size", 2, "it has 1 workers"),
        ("parallel_config", "worker_extension_cls", "", "no extension of mcore_rl"),
    ],
)
def test_what_a_server_lacks_is_said_with_the_command_that_has_it(section, field, value, said):
    spec = spec_of("http://h:1")
    check_server(spec.url, GOOD, spec, link_of(spec))
    found = {**GOOD, section: {**GOOD[section], field: value}, "weight_transfer_config": None}
    with pytest.raises(UserError) as error:
        check_server(spec.url, found, spec, link_of(spec))
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(
        "rollout.server_urls: the server http://h:1 is not as the run wants it: "
    )
    assert said in line
    assert "weight_transfer_config has backend None" in line
    assert line.endswith(server_command(spec, link_of(spec)))


def test_stop_texts_need_a_tokenizer_and_overrides_have_to_be_there():
    spec = spec_of("http://h:1", stop=["\n"])
    with pytest.raises(UserError, match=r"no tokenizer, which rollout\.stop needs"):
        check_server(spec.url, GOOD, spec, link_of(spec))
    assert "--skip-tokenizer-init" not in server_command(spec, link_of(spec))
    spec = replace(spec_of("http://h:1"), config_overrides={"scoring_func": "sigmoid"})
    with pytest.raises(UserError, match="hf_overrides lack some of this model"):
        check_server(spec.url, GOOD, spec, link_of(spec))
    assert """--hf-overrides '{"scoring_func": "sigmoid"}'""" in server_command(spec, link_of(spec))


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/health": 503}, "is not to be reached, or no vLLM server: .*503"),
        ({"/server_info": 404}, "has no development endpoints. .*VLLM_SERVER_DEV_MODE=1"),
        ({"/inference/v1/generate": 404}, "HTTP 404.. Start it with --enable-scale-out"),
        ({"/inference/v1/generate": 401}, "HTTP 401.. Set VLLM_API_KEY here"),
        ({"/server_info": {"vllm_config": {**GOOD, "model_config": {}}}}, "has no 'dtype'"),
        ({"broken_updates": {"results": [["x"]]}}, "broke off; it takes no other. Start it again"),
    ],
)
def test_a_server_that_cannot_serve_is_a_mistake_of_the_user(server, answers, said):
    server.answers |= answers
    spec = spec_of(server.url)
    with pytest.raises(UserError, match=said):
        ServerEngine(spec, link_of(spec))


def test_a_server_that_is_not_there_is_said_at_once():
    spec = spec_of("http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 is not to be reached"):
        ServerEngine(spec, link_of(spec))
