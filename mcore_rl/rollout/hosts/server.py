"""A vLLM server that runs already, as an engine: tokens go and come by HTTP.

The process with this class holds no model. It passes the train worker's updates on to the server.
The server's workers open the transport's receiver like those of any engine, so the arrived weights
are compared there. This needs vLLM's development endpoints, its endpoint for tokens and our worker
extension: `server_command` says how to start one. What a server lacks is reported when the run
starts.

A server serves one run at a time, and nobody else: anybody who can reach the development endpoints
can change its weights.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shlex
import threading
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np

from mcore_rl.errors import RolloutError, UserError, WeightSyncError
from mcore_rl.foreign_json import parse_json
from mcore_rl.rollout.base import (
    EnginePart,
    EngineSpec,
    GenerationRequest,
    GenerationResult,
)
from mcore_rl.types import VersionSpan
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.intake import refuse

T = TypeVar("T")

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key of the servers, if they have one."""
START_LIMIT_S = 20.0
"""Seconds for a server to return its configuration."""
_FAILURES = (aiohttp.ClientError, OSError, RuntimeError, TimeoutError, ValueError)
"""Errors of a call: not reached, refused, or answered with something that is not JSON."""
SILENCE_S = 4.0
"""Seconds without a token until the server's health is asked; it has as long to answer."""
CALL_LIMIT_S = 600.0
"""Seconds for every call except drawing: the update of a bucket, the digests of a model."""
KEEP_ALIVE_S = 1.0
_EXTENSION = "mcore_rl.rollout.vllm_worker.WorkerExtension"


def server_command(spec: EngineSpec, link: Link) -> str:
    """Return the command that starts a server as a run needs it, without host and port."""
    options = {
        "--model": spec.model_path,
        "--dtype": spec.dtype,
        "--max-model-len": str(spec.max_model_len),
        "--tensor-parallel-size": str(link.num_receivers),
        "--load-format": "dummy",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--weight-transfer-config": json.dumps({"backend": "linked"}),
        "--worker-extension-cls": _EXTENSION,
    }
    if spec.config_overrides:
        options["--hf-overrides"] = json.dumps(dict(spec.config_overrides))
    words = [word for pair in options.items() for word in pair]
    flags = ["--enable-scale-out", *([] if spec.config.stop else ["--skip-tokenizer-init"])]
    command = ["python", "-m", "vllm.entrypoints.openai.api_server", *words, *flags]
    return f"VLLM_SERVER_DEV_MODE=1 {shlex.join(command)}"


@dataclass(slots=True)
class _Running:
    """A request whose tokens are arriving."""

    task: Any
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, choice: dict[str, Any]) -> None:
        """Take the tokens drawn since the last call."""
        tokens = choice["token_ids"] or []
        content = (choice["logprobs"] or {}).get("content") or []
        if [entry["token_id"] for entry in content] != list(tokens):
            raise ValueError("tokens and log-probabilities do not belong together")
        self.token_ids += tokens
        self.logprobs += [entry["logprob"] for entry in content]
        self.finish_reason = choice["finish_reason"]
        if spans := choice.get("weight_versions"):
            self.versions = [VersionSpan(int(s["version"]), s["start"], s["end"]) for s in spans]

    def result(self) -> GenerationResult:
        return GenerationResult(
            token_ids=np.array(self.token_ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            finish_reason=self.finish_reason or "abort",
            versions=self.versions,
        )


class ServerEngine:
    """A `RolloutEngine`; the server draws requests independently of calls of `step`.

    Args:
        spec: what the run wants of the server, and its `url`.
        link: brings its weights.

    Raises:
        UserError: if the server cannot be reached, or lacks something.
    """

    def __init__(self, spec: EngineSpec, link: Link) -> None:
        self.weight_version = self._coming_version = -1
        self._url, self._spec = spec.url.rstrip("/"), spec
        self._running: dict[int, _Running] = {}
        self._events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._prefix = uuid.uuid4().hex  # other runs' requests have other names
        self._is_paused = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._session = self._wait(_open_session(), START_LIMIT_S)
        try:
            check_server(self._url, self._ask_what_it_is(), spec, link)
            self._check_tokens()
            if any(self._of_workers("broken_updates")):
                raise UserError(
                    f"rollout.server_urls: a weight update of the server {self._url} broke off; "
                    "it takes no other. Start it again."
                )
            self._post("/init_weight_transfer_engine", {"init_info": {"link": asdict(link)}})
        except BaseException:
            self.close()
            raise

    # What is drawn

    def add(self, number: int, request: GenerationRequest) -> None:
        """See `RolloutEngine`."""
        drawing = asyncio.run_coroutine_threadsafe(self._draw(number, request), self._loop)
        self._running[number] = _Running(drawing)

    def step(self) -> list[tuple[int, GenerationResult]]:
        """See `RolloutEngine`; waits until the server has drawn something."""
        events = [self._next_event()]
        while not self._events.empty():
            events.append(self._events.get())
        ended = []
        for number, event in events:
            if number not in self._running:
                continue
            if isinstance(event, Exception):
                raise self._failure(f"broke off a response: {event}") from event
            running = self._running[number]
            try:
                running.take(event)
            except (KeyError, TypeError, ValueError) as error:
                raise self._failure(f"answered what cannot be read: {error}") from error
            if running.finish_reason is not None:
                ended.append((number, self._running.pop(number).result()))
        return ended

    def _next_event(self) -> tuple[int, Any]:
        """Wait for an event of a request; if none comes, check that the server is alive."""
        while True:
            try:
                return self._events.get(timeout=SILENCE_S)
            except queue.Empty:
                try:
                    self._wait(self._request("GET", "/health"), SILENCE_S)
                except _FAILURES as error:
                    raise self._failure(f"does not answer: {str(error) or repr(error)}") from error

    def abort(self, numbers: Sequence[int]) -> list[tuple[int, GenerationResult]]:
        """See `RolloutEngine`."""
        wanted = set(numbers)
        names = [f"{_SERVERS_PREFIX}{self._name(number)}" for number in numbers]
        self._post("/abort_requests", {"request_ids": names})
        found = []
        while wanted & self._running.keys():  # each ends with its tokens, or has ended
            found += self.step()
        return found

    def any_rank(self, is_so: bool) -> bool:
        """See `RolloutEngine`."""
        return is_so

    async def _draw(self, number: int, request: GenerationRequest) -> None:
        """Draw a request; all its results become events."""
        body = {
            "request_id": self._name(number),
            "token_ids": request.prompt_token_ids.tolist(),
            "sampling_params": {
                **{name: getattr(request.sampling, name) for name in _SAMPLING},
                "stop_token_ids": list(self._spec.stop_token_ids),
                "stop": list(self._spec.config.stop),
                "detokenize": bool(self._spec.config.stop),
                "ignore_eos": True,  # only the ends above, none of the server's own
                "logprobs": 0,  # the sampled token's own
            },
            "stream": True,
        }
        try:
            has_ended = False
            no_limit = aiohttp.ClientTimeout(total=None)
            url = f"{self._url}/inference/v1/generate"
            async with self._session.post(url, json=body, timeout=no_limit) as response:
                await _raise_for(response)
                async for line in response.content:
                    text = line.decode().strip()
                    if not text.startswith("data: ") or text == "data: [DONE]":
                        continue
                    chunk = parse_json(text.removeprefix("data: "))
                    if "error" in chunk:
                        raise RuntimeError(str(chunk["error"]))
                    for choice in chunk["choices"]:
                        has_ended = choice["finish_reason"] is not None
                        self._events.put((number, choice))
            if not has_ended:
                raise RuntimeError("the response has no end")
        except Exception as error:  # noqa: BLE001  it is told by `step`
            self._events.put((number, error))

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number}"

    def sleep(self, level: int) -> None:
        """A server has devices of its own: the configuration refuses it."""
        raise RolloutError("a server does not sleep", role="rollout")

    def wake(self, part: EnginePart) -> None:
        """See `sleep`."""
        raise RolloutError("a server does not sleep", role="rollout")

    # Its weights

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weight_version, self._coming_version = -1, version
        self._post("/pause?mode=keep", {})
        self._is_paused = True
        self._of_workers("begin_intake", version, with_digests)
        self._post("/start_weight_update", {})

    def update_weights(self, update: Any) -> None:
        self._post("/update_weights", {"update_info": {"update": asdict(update)}})

    def finish_weight_update(self, manifest: Manifest) -> None:
        for differences in self._of_workers("differences_from_json", manifest.to_json()):
            refuse(differences, self._coming_version)
        self._post("/finish_weight_update", {"weight_version": str(self._coming_version)})
        # The cache of running requests is computed again up to their last token.
        answer = self._post("/reset_prefix_cache?reset_running_requests=true", {})
        if not answer.get("success"):
            raise self._failure("kept keys and values of other weights")
        self._resume()
        self.weight_version = self._coming_version

    def abort_weight_update(self) -> None:
        """See `UpdateSession`. The server stays paused: its layers are half loaded. If it drew the
        waiting requests, the tokens would be wrong or the server would crash."""
        self.weight_version = -1
        self._of_workers("abort_intake")

    def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._post("/resume", {})

    def loaded_digests(self) -> list[dict[str, str]]:
        return self._of_workers("loaded_digests")

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        self.weight_version = -1
        return self._of_workers("load_folder", folder)

    def close(self) -> None:
        for running in self._running.values():
            running.task.cancel()
        self._wait(self._session.close(), START_LIMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # How it is reached

    def _of_workers(self, method: str, *args: Any) -> list[Any]:
        """Return what each worker of the server answers."""
        answer = self._post("/collective_rpc", {"method": method, "args": args})
        return answer.get("results", [])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return what the server answers.

        Raises:
            WeightSyncError: if it fails, or cannot be reached.
        """
        try:
            return self._wait(self._request("POST", path, json=body), CALL_LIMIT_S)
        except _FAILURES as error:
            raise self._failure(
                f"did not do {path.partition('?')[0]}: {str(error) or repr(error)}"
            ) from error

    async def _request(self, method: str, path: str, **how: Any) -> dict[str, Any]:
        async with self._session.request(method, self._url + path, **how) as response:
            await _raise_for(response)
            text = await response.text()
            return parse_json(text) if text else {}

    def _ask_what_it_is(self) -> dict[str, Any]:
        """Return the configuration of the server.

        Raises:
            UserError: if it does not return it.
        """
        try:
            self._wait(self._request("GET", "/health"), START_LIMIT_S)
        except _FAILURES as error:
            raise UserError(
                f"rollout.server_urls: {self._url} is not to be reached, or no vLLM server: "
                f"{str(error) or repr(error)}."
            ) from error
        try:
            path = "/server_info?config_format=json"
            return self._wait(self._request("GET", path), START_LIMIT_S)["vllm_config"]
        except (*_FAILURES, KeyError, TypeError) as error:
            raise UserError(
                f"rollout.server_urls: {self._url} has no development endpoints. Start it with "
                "VLLM_SERVER_DEV_MODE=1."
            ) from error

    def _check_tokens(self) -> None:
        """Raise a UserError unless the server takes and gives tokens, for this run."""
        try:
            self._wait(self._request("POST", "/inference/v1/generate", json={}), START_LIMIT_S)
        except _FAILURES as error:  # HTTP 400 is the right answer to an empty request
            fixes = {"401": f"Set {KEY_VARIABLE} here.", "404": "Start it with --enable-scale-out."}
            fixes["403"] = fixes["401"]
            status = str(error).removeprefix("HTTP ").partition(":")[0]
            if status in fixes:
                raise UserError(
                    f"rollout.server_urls: {self._url} does not take tokens "
                    f"(/inference/v1/generate: HTTP {status}). {fixes[status]}"
                ) from error

    def _wait(self, coroutine: Coroutine[Any, Any, T], limit_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(limit_s)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(f"no answer within {limit_s:.0f} s") from None

    def _failure(self, what: str) -> WeightSyncError | RolloutError:
        kind = WeightSyncError if self.weight_version < 0 else RolloutError
        return kind(f"the server {self._url} {what}", role="rollout")


_SERVERS_PREFIX = "generate-tokens-"
"""What the server puts before a request's name (scale_out/token_in_token_out/serving.py)."""
_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "seed")


async def _open_session() -> aiohttp.ClientSession:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # As many requests as the controller sends; a server closes idle connections after 5 s.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    return aiohttp.ClientSession(headers=headers, connector=connector, read_bufsize=1 << 20)


async def _raise_for(response: aiohttp.ClientResponse) -> None:
    if response.status >= 400:
        text = " ".join((await response.text()).split())
        raise RuntimeError(f"HTTP {response.status}: {text[:500]}")


def check_server(url: str, found: dict[str, Any], spec: EngineSpec, link: Link) -> None:
    """Raise a UserError that names everything the server lacks.

    Args:
        url: of the server.
        found: vLLM's configuration there, as `/server_info?config_format=json` gives it.
        spec: what the run wants.
        link: by which its weights would come.
    """
    try:
        _check_configuration(url, found, spec, link)
    except KeyError as error:
        raise UserError(
            f"rollout.server_urls: the server {url} runs a vLLM version that is not supported: its "
            f"configuration has no {error}."
        ) from error


def _check_configuration(url: str, found: dict[str, Any], spec: EngineSpec, link: Link) -> None:
    model, parallel = found["model_config"], found["parallel_config"]
    transfer = (found.get("weight_transfer_config") or {}).get("backend")
    overrides = model.get("hf_overrides") or {}
    wrong = [
        (f"dtype is {model['dtype']}", model["dtype"] == f"torch.{spec.dtype}"),
        (
            f"max_model_len is {model['max_model_len']}, less than {spec.max_model_len}",
            model["max_model_len"] >= spec.max_model_len,
        ),
        (
            f"it has {parallel['world_size']} workers, not rollout.tensor_model_parallel_size="
            f"{link.num_receivers}",
            parallel["world_size"] * parallel["data_parallel_size"] == link.num_receivers,
        ),
        (
            f"logprobs_mode is {model['logprobs_mode']}",
            model["logprobs_mode"] == "processed_logprobs",
        ),
        (f"weight_transfer_config has backend {transfer}", transfer == "linked"),
        (
            "its workers have no extension of mcore_rl",
            parallel["worker_extension_cls"] == _EXTENSION,
        ),
        (
            "hf_overrides lack some of this model",
            all(overrides.get(key) == value for key, value in spec.config_overrides.items()),
        ),
        (
            "it has no tokenizer, which rollout.stop needs",
            not (spec.config.stop and model["skip_tokenizer_init"]),
        ),
        (
            f"it has another model, {model['model']}",
            _architecture(model["model"]) in (None, _architecture(spec.model_path)),
        ),
    ]
    if problems := [text for text, is_right in wrong if not is_right]:
        raise UserError(
            f"rollout.server_urls: the server {url} is not as the run wants it: "
            f"{'; '.join(problems)}. Start it with: {server_command(spec, link)}"
        )


def _architecture(folder: str) -> tuple[Any, ...] | None:
    """Return what the configurations of two folders must share; None if it is not on this
    machine."""
    file = Path(folder) / "config.json"
    if not file.exists():
        return None
    config = parse_json(file.read_text(encoding="utf-8"))
    names = ("architectures", "hidden_size", "num_hidden_layers", "vocab_size")
    return tuple(str(config.get(name)) for name in names)
