"""A server as an engine, against one of our own that says what a test wants it to say.

What a real one does is shown by the tests of engines in `tests/e2e`.
"""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest
from aiohttp import web

from mcore_rl.errors import RunError, UserError
from mcore_rl.rollout.base import (
    EngineSpec,
    GenerationRequest,
    PauseMode,
    RolloutConfig,
    SamplingParams,
)
from mcore_rl.rollout.hosts import server as host
from mcore_rl.rollout.hosts.server import ServerEngine
from mcore_rl.rollout.serving import ServingEngine
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.digest import Manifest

WANTED = {
    "model_config": {
        "dtype": "torch.float32",
        "max_model_len": 64,
        "logprobs_mode": "processed_logprobs",
        "hf_overrides": {},
        "skip_tokenizer_init": True,
        "model": "elsewhere",
    },
    "parallel_config": {
        "world_size": 1,
        "data_parallel_size": 1,
        "worker_extension_cls": "mcore_rl.rollout.vllm_worker.WorkerExtension",
    },
    "weight_transfer_config": {"backend": "linked"},
}


class FakeServer:
    """Answers as vLLM does; a response is drawn token by token until `hold` or an abort."""

    def __init__(self):
        self.calls, self.bodies = [], {}
        self.info, self.differences = json.loads(json.dumps(WANTED)), []
        self.hold_after, self.fault, self.is_paused, self.version = None, "", False, "default"
        self.aborted, self.is_frozen = set(), False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    async def _start(self):
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # pyright: ignore

    def close(self):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _answer(self, request):
        path, body = request.path, await request.json() if request.can_read_body else {}
        self.calls.append(path)
        self.bodies[path] = body
        while self.is_frozen:
            await asyncio.sleep(0.05)
        match path:
            case "/inference/v1/generate":
                return await self._generate(request, body)
            case "/server_info":
                return web.json_response({"vllm_config": self.info})
            case "/pause" | "/resume":
                self.is_paused = path == "/pause"
            case "/abort_requests":
                self.aborted |= set(body["request_ids"])
            case "/finish_weight_update":
                self.version = body["weight_version"]
            case "/reset_prefix_cache":
                return web.json_response({"success": self.fault != "stale cache"})
            case "/collective_rpc":
                named = {"differences_from_json": self.differences}
                return web.json_response({"results": [named.get(body["method"])]})
            case "/health" if self.fault == "no vLLM":
                return web.Response(text="<html>It works!</html>")
        return web.json_response({})

    async def _generate(self, request, body):
        if not body:
            return web.json_response({}, status=400)
        response = web.StreamResponse()
        await response.prepare(request)
        name, spans = "generate-tokens-" + body["request_id"], []
        for at in range(body["sampling_params"]["max_tokens"]):
            while self.is_paused or (self.hold_after is not None and at >= self.hold_after):
                if name in self.aborted:
                    await self._say(response, [], "abort", spans)
                    return response
                await asyncio.sleep(0.01)
            if spans and spans[-1]["version"] == self.version:
                spans[-1]["end"] = at + 1
            else:
                spans.append({"version": self.version, "start": at, "end": at + 1})
            if self.fault == "garbage":
                await response.write(b"data: {not JSON\n\n")
            if self.fault == "no end":
                return response
            is_last = at + 1 == body["sampling_params"]["max_tokens"]
            await self._say(response, [at], "length" if is_last else None, spans)
        return response

    async def _say(self, response, tokens, finish_reason, spans):
        content = [{"token_id": token, "logprob": LOGPROB} for token in tokens]
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": content},
            "finish_reason": finish_reason,
            "weight_versions": spans if finish_reason else None,
        }
        await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())


LOGPROB = -4.6443915367126465  # a float32, as vLLM writes it


@pytest.fixture
def fake():
    server = FakeServer()
    yield server
    server.close()


def make_engine(fake, **rollout) -> ServingEngine:
    config = RolloutConfig(host="server", server_urls=[fake.url], **rollout)
    spec = EngineSpec(
        model_path="elsewhere",
        dtype="float32",
        max_model_len=32,
        stop_token_ids=[4],
        config=config,
        run_folder="",
        url=fake.url,
    )
    link = Link(transport="disk", run_folder="", engine=0, engine_rank=0)
    return ServingEngine(ServerEngine(spec, link))


def requests(number, max_tokens):
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=max_tokens, seed=7)
    prompt = np.array([1, 2], np.int32)
    return [GenerationRequest(prompt_token_ids=prompt, sampling=sampling)] * number


def take_weights(engine, version):
    engine.start_weight_update(version)
    engine.finish_weight_update(Manifest())


def test_tokens_and_logprobs_come_as_they_were_drawn_and_the_run_s_ends_hold_alone(fake):
    engine = make_engine(fake)
    take_weights(engine, 3)
    future = engine.submit([requests(2, 5)])[0]
    while not future.done():
        engine.run()
    for result in future.result():
        assert result.token_ids.tolist() == [0, 1, 2, 3, 4]
        assert result.logprobs.tolist() == [LOGPROB] * 5
        assert [(s.version, s.start, s.end) for s in result.versions] == [(3, 0, 5)]
    asked = fake.bodies["/inference/v1/generate"]["sampling_params"]
    assert (asked["seed"], asked["stop_token_ids"], asked["ignore_eos"]) == (7, [4], True)
    engine.close()


def test_running_requests_go_on_under_new_weights_with_a_span_for_each(fake):
    engine = make_engine(fake)
    take_weights(engine, 1)
    fake.hold_after = 2
    future = engine.submit([requests(1, 6)])[0]
    engine.run()
    engine.pause(PauseMode.KEEP)
    engine.start_weight_update(2)
    assert fake.is_paused, "it would draw from half of the weights"
    fake.hold_after = None
    engine.finish_weight_update(Manifest())
    engine.resume()
    while not future.done():
        engine.run()
    (result,) = future.result()
    spans = [(span.version, span.start, span.end) for span in result.versions]
    assert [version for version, _, _ in spans] == [1, 2]
    assert (spans[0][1], spans[0][2], spans[1][2]) == (0, spans[1][1], 6)
    engine.close()


def test_an_aborted_response_has_what_was_drawn_of_it(fake):
    engine = make_engine(fake)
    take_weights(engine, 1)
    fake.hold_after = 3
    future = engine.submit([requests(1, 9)])[0]
    engine.run()
    engine.abort(future)
    (result,) = future.result()
    assert result.finish_reason == "abort"
    assert len(result.token_ids) <= 3
    engine.close()


def test_a_server_whose_update_broke_off_draws_nothing_more(fake):
    engine = make_engine(fake)
    take_weights(engine, 1)
    fake.differences = ["model.norm.weight did not arrive"]
    engine.start_weight_update(2)
    with pytest.raises(RunError, match=r"model\.norm\.weight did not arrive"):
        engine.finish_weight_update(Manifest())
    engine.abort_weight_update()
    assert fake.is_paused
    assert fake.calls.count("/finish_weight_update") == 1
    with pytest.raises(RunError, match="has no complete weights"):
        engine.submit([requests(1, 1)])[0]
    engine.close()


def test_keys_and_values_of_other_weights_are_refused(fake):
    engine = make_engine(fake)
    fake.fault = "stale cache"
    engine.start_weight_update(1)
    with pytest.raises(RunError, match="kept keys and values of other weights"):
        engine.finish_weight_update(Manifest())
    assert engine.weight_version == -1
    engine.close()


@pytest.mark.parametrize(
    ("fault", "message"), [("garbage", "broke off a response"), ("no end", "has no end")]
)
def test_what_cannot_be_of_a_response_names_the_server(fake, fault, message):
    engine = make_engine(fake)
    take_weights(engine, 1)
    fake.fault = fault
    future = engine.submit([requests(1, 3)])[0]
    engine.run()
    with pytest.raises(RunError, match=message) as caught:
        future.result()
    assert fake.url in str(caught.value)
    engine.close()


def test_a_server_that_hangs_is_named(fake, monkeypatch):
    monkeypatch.setattr(host, "SILENCE_S", 0.2)
    engine = make_engine(fake)
    take_weights(engine, 1)
    fake.is_frozen = True
    future = engine.submit([requests(1, 3)])[0]
    engine.run()
    with pytest.raises(RunError, match="does not answer") as caught:
        future.result()
    assert fake.url in str(caught.value)
    fake.is_frozen = False
    engine.close()


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("model_config", "dtype", "torch.bfloat16", "dtype is torch.bfloat16"),
        ("model_config", "max_model_len", 16, "max_model_len is 16, less than 32"),
        ("model_config", "logprobs_mode", "raw_logprobs", "logprobs_mode is raw_logprobs"),
        ("parallel_config", "world_size", 2, "it has 2 workers"),
        ("parallel_config", "worker_extension_cls", "", "no extension of mcore_rl"),
        ("weight_transfer_config", "backend", "nccl", "has backend nccl"),
    ],
)
def test_what_a_server_lacks_is_one_line_with_the_command_that_starts_one(
    fake, section, key, value, said
):
    fake.info[section][key] = value
    with pytest.raises(UserError) as caught:
        make_engine(fake)
    line = str(caught.value)
    for part in (said, fake.url, "VLLM_SERVER_DEV_MODE=1 python -m vllm"):
        assert part in line
    assert "\n" not in line
    assert "/init_weight_transfer_engine" not in fake.calls


def test_who_is_no_vllm_server_is_said_to_be_none(fake):
    fake.fault = "no vLLM"
    with pytest.raises(UserError, match="is not to be reached, or no vLLM server"):
        make_engine(fake)
