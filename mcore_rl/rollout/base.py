"""What a rollout engine is: token ids in; token ids, log-probabilities and finish reason out, and
the experts that each token was routed to when they are asked for.

An engine holds weights of a known version and takes new ones through an update session
(`weight_sync.base.UpdateSession`), which is vLLM's own lifecycle. The receiver that its link opens
decides how they come. Engines sample; they neither tokenize nor score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from mcore_rl.dtypes import DTYPES
from mcore_rl.errors import refuse_unread, require, require_one_of
from mcore_rl.registry import Registry
from mcore_rl.types import Ids, Numbers, RoutesAt, Routing, VersionSpan
from mcore_rl.weight_sync.base import TRANSPORTS, Distance, Link, UpdateSession

CPU_KV_CACHE_BYTES = 256 << 20
"""Size of the KV cache of an engine on CPU, unless set otherwise."""


@dataclass(kw_only=True, slots=True)
class ValKwargsConfig:
    """`rollout.val_kwargs`: sampling at validation."""

    n: int = 1
    """Samples per prompt; greedy, 1."""
    do_sample: bool = False
    """False: greedy; the keys below are then not read."""
    temperature: float = 1.0
    """With greedy sampling, 0.0 is allowed too."""
    top_p: float = 1.0
    """Probability that the tokens sampled from hold together; 1.0: all tokens."""
    top_k: int = -1
    """Number of likeliest tokens sampled from; -1: all."""

    def __post_init__(self) -> None:
        # For a larger n, the number of subsets (rewards/at_k.py) does not fit a float.
        require(1 <= self.n <= 1000, "rollout.val_kwargs.n", self.n, "must lie in [1, 1000]")
        require(
            self.temperature > 0 or (self.temperature == 0 and not self.do_sample),
            "rollout.val_kwargs.temperature",
            self.temperature,
            "must be > 0",
            "Set rollout.val_kwargs.do_sample=false for greedy decoding.",
        )
        top_p, top_k = self.top_p, self.top_k
        require(0 < top_p <= 1, "rollout.val_kwargs.top_p", top_p, "must lie in (0, 1]")
        is_size = top_k == -1 or top_k >= 1
        require(is_size, "rollout.val_kwargs.top_k", top_k, "must be -1 or at least 1")
        if not self.do_sample:
            rule = f"would draw one greedy answer {self.n} times"
            fix = "Set rollout.val_kwargs.do_sample=true."
            require(self.n == 1, "rollout.val_kwargs.n", self.n, rule, fix)
            unread = ["top_p", "top_k", *(["temperature"] if self.temperature else [])]
            refuse_unread(self, "rollout.val_kwargs", unread, "do_sample=false")


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """`rollout`: the engine and how it samples while training."""

    name: str = "vllm"
    """Engine: vllm, or fake (a deterministic engine without a model, for tests and dry runs)."""
    host: str = "in_process"
    """Where an engine runs: in_process (in the train workers' processes), process (in a process of
    its own, with vLLM's own executor) or server (a vLLM server that runs already)."""
    server_urls: list[str] = field(default_factory=list)
    """With host server: URLs of the servers, such as "http://10.0.0.5:8000"; each is an engine."""
    nnodes: int = 0
    """With host process: number of nodes for engines only; 0: engines share the trainer's nodes."""
    n_gpus_per_node: int | None = None
    """Devices of each of these nodes. With a launcher for one machine, these are devices of this
    machine that the trainer does not use."""
    max_engine_restarts: int = 0
    """With host process: how often failed engines are started again, in total."""
    n: int = 1
    """Samples per prompt: the size of a group."""
    stop_stragglers: bool = False
    """Draw data.gen_batch_size groups and stop the rest once data.train_batch_size have ended.
    Long responses then train less often."""
    temperature: float = 1.0
    """By which logits are divided, in sampling and in training."""
    top_p: float = 1.0
    """Only 1.0: the trainer cannot reproduce renormalised log-probabilities."""
    top_k: int = -1
    """Only -1, for the same reason."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response, in addition to the end tokens, in validation too. The tokens that
    complete the text are part of the response."""
    tensor_model_parallel_size: int = 1
    """Number of train workers that host one engine together, each with a part of every layer."""
    dtype: str | None = None
    """Type of the engine's weights; None: that of the actor."""
    max_model_len: int | None = None
    """Longest prompt plus response; None: the sum of both limits in `data`."""
    max_num_seqs: int = 256
    """Requests that the engine runs at one time."""
    max_num_batched_tokens: int | None = None
    """Most tokens of one forward pass; None: the engine's own. On CPU not read."""
    enable_chunked_prefill: bool | None = None
    """Compute long prompts in chunks; None: the engine's own. On CPU not read: never."""
    gpu_memory_utilization: float = 0.5
    """Share of a CUDA device's memory for the engine."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache; None: by gpu_memory_utilization on CUDA, 256 MiB on CPU."""
    sleep_level: int = 0
    """What an engine frees while it does not generate: 0, nothing; 1, its cache, and its weights
    move to host memory; 2, both, until the next sync brings weights."""
    enforce_eager: bool | None = None
    """Run without graphs and compilation; None: yes on CPU, no on CUDA."""
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the engine, passed on unchanged."""
    weight_transport: str | None = None
    """How weights reach the engine: direct (by reference, in the train worker's process),
    shared_memory, gloo or disk (a folder that both see), ipc (another process of the same CUDA
    device), nccl (CUDA devices of the engine's own); None: by the host, gloo with nnodes."""
    lora_sync: str = "auto"
    """With model.lora_rank: what every sync after the first sends. adapter: only the adapters,
    which the engine applies in addition to the weights; merged: all weights with the adapters
    merged; auto: adapter where that has been shown to work."""
    update_weights_bucket_mib: int = 512
    """Most MiB of weights that are gathered and sent at a time; a larger tensor is sent alone."""
    compare_loaded_weights: bool = True
    """Before the first step, compare what all engines have loaded from the sync, parameter by
    parameter and bit by bit; in a run that starts from the model's folder also with what the first
    engine loads from there. Reads the model once more."""
    logprob_tolerance: float | None = None
    """Largest difference of log-probabilities between engine and trainer that the check before
    step 0 accepts; None: that of the actor's dtype in `tolerances.py`, which also has the limits
    for the mean and for most tokens in bfloat16."""
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)

    def __post_init__(self) -> None:
        require_one_of("rollout.name", self.name, ENGINES)
        require_one_of("rollout.host", self.host, HOSTS)
        TRANSPORTS.get(self.transport)
        require_one_of("rollout.lora_sync", self.lora_sync, ("auto", "adapter", "merged"))
        self._check_placement()
        for text in self.stop:
            require(bool(text), "rollout.stop", self.stop, "holds an empty text", "Remove it.")
        rule = "is not read by an engine without texts"
        has_texts = ENGINES.get(self.name).has_texts
        require(not self.stop or has_texts, "rollout.stop", self.stop, rule, "Remove it.")
        trust = self.engine_kwargs.get("trust_remote_code")
        rule = "would run the code of a model's folder"
        require(not trust, "rollout.engine_kwargs.trust_remote_code", trust, rule, "Leave it out.")
        level = self.sleep_level
        require(level in (0, 1, 2), "rollout.sleep_level", level, "must be 0, 1 or 2")
        tp = self.tensor_model_parallel_size
        require(tp >= 1, "rollout.tensor_model_parallel_size", tp, "must be at least 1")
        require(self.n >= 1, "rollout.n", self.n, "must be at least 1")
        require(
            self.temperature > 0,
            "rollout.temperature",
            self.temperature,
            "must be > 0",
            "Greedy rollouts carry no policy gradient; use rollout.val_kwargs to validate.",
        )
        require(
            self.top_p == 1.0,
            "rollout.top_p",
            self.top_p,
            "would make the engine's log-probabilities differ from the trainer's",
            "Leave it at 1.0; rollout.val_kwargs.top_p is free.",
        )
        require(
            self.top_k == -1,
            "rollout.top_k",
            self.top_k,
            "would make the engine's log-probabilities differ from the trainer's",
            "Leave it at -1; rollout.val_kwargs.top_k is free.",
        )
        if self.dtype is not None:
            require_one_of("rollout.dtype", self.dtype, DTYPES)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "update_weights_bucket_mib",
            "kv_cache_memory_bytes",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"rollout.{name}", value, "must be at least 1")
        tolerance = self.logprob_tolerance
        is_positive = tolerance is None or tolerance > 0
        require(is_positive, "rollout.logprob_tolerance", tolerance, "must be > 0")
        require(
            0 < self.gpu_memory_utilization <= 1,
            "rollout.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "must lie in (0, 1]",
        )

    def _check_placement(self) -> None:
        if self.host == "in_process":
            refuse_unread(self, "rollout", ["stop_stragglers"], "host=in_process")
        if self.host != "process":
            unread = ["nnodes", "n_gpus_per_node", "max_engine_restarts"]
            refuse_unread(self, "rollout", unread, f"host={self.host}")
        self._check_servers()
        nodes, devices = self.nnodes, self.n_gpus_per_node
        require(nodes >= 0, "rollout.nnodes", nodes, "must be at least 0")
        rule = "is not set" if nodes else "is not read with rollout.nnodes=0"
        fix = "Name the devices of a node." if nodes else "Set rollout.nnodes or leave it out."
        require((devices is None) == (nodes == 0), "rollout.n_gpus_per_node", devices, rule, fix)
        rule = f"frees devices that the trainer does not use (rollout.nnodes={nodes})"
        fix = "Leave it at 0."
        require(
            nodes == 0 or not self.sleep_level, "rollout.sleep_level", self.sleep_level, rule, fix
        )
        restarts = self.max_engine_restarts
        require(restarts >= 0, "rollout.max_engine_restarts", restarts, "must be at least 0")

    def _check_servers(self) -> None:
        urls, is_server = self.server_urls, self.host == "server"
        rule = "is not set" if is_server else f"is not read with rollout.host={self.host}"
        require(bool(urls) == is_server, "rollout.server_urls", urls, rule)
        for url in urls:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
            rule = f"holds {url!r}, which is no http address"
            require(is_url, "rollout.server_urls", urls, rule, "Write http://host:port.")
        rule = "names a server twice"
        require(len(set(urls)) == len(urls), "rollout.server_urls", urls, rule)
        if is_server:
            require(self.name == "vllm", "rollout.name", self.name, "is no server", "Use vllm.")
            refuse_unread(self, "rollout", _DECIDED_BY_SERVERS, "host=server")
            rule = "is not read with rollout.host=server, which has its own"
            kwargs = self.engine_kwargs
            require(not kwargs, "rollout.engine_kwargs", kwargs, rule, "Remove them.")

    @property
    def transport(self) -> str:
        """The weight transport: the named one, or that of the host."""
        return self.weight_transport or ("gloo" if self.nnodes else HOSTS[self.host].transport)

    @property
    def distance(self) -> Distance:
        """Where engines are, seen from the train workers that feed them."""
        if self.host == "server" and all(urlsplit(u).hostname in _HERE for u in self.server_urls):
            return Distance.SAME_MACHINE
        return HOSTS[self.host].distance


@dataclass(frozen=True, slots=True)
class _Host:
    """Properties of a place where an engine can run."""

    transport: str
    """Weight transport, unless another is named."""
    distance: Distance


HOSTS = {
    "in_process": _Host("direct", Distance.SAME_PROCESS),
    "process": _Host("shared_memory", Distance.SAME_MACHINE),
    "server": _Host("disk", Distance.OTHER_MACHINE),
}

_HERE = ("localhost", "127.0.0.1", "::1")
_DECIDED_BY_SERVERS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "sleep_level",
    "enforce_eager",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled."""

    temperature: float
    """0.0: greedy."""
    top_p: float
    top_k: int
    max_tokens: int
    """Response tokens at most, the end token included."""
    seed: int
    """Same weights, prompt and seed: same response, whatever other requests run."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationRequest:
    """A request for one response."""

    prompt_token_ids: Ids
    sampling: SamplingParams

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_token_ids", np.asarray(self.prompt_token_ids, np.int32))


class EnginePart(Enum):
    """A part of an engine that sleeps and wakes separately."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"


class PauseMode(Enum):
    """What happens to unfinished requests in a pause."""

    KEEP = "keep"
    """They wait, and go on afterwards."""
    WAIT = "wait"
    """They end first."""
    ABORT = "abort"
    """They end with the tokens drawn so far."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationResult:
    """One response."""

    token_ids: Ids
    """Response tokens, the end token included when it was produced."""
    logprobs: Numbers
    """Natural log-probability of each response token after temperature."""
    finish_reason: str
    """"stop", "length" or "abort"."""
    versions: Sequence[VersionSpan]
    """Versions of the weights that produced the tokens, in token order and without a gap."""
    text: str = ""
    """`token_ids` decoded without special tokens, by the engine's host where
    `EngineSpec.with_text` asks for it."""
    routed_experts: np.ndarray | RoutesAt | None = None
    """See `TokenSequence.routed_experts`; None unless `EngineSpec.routing` asks for it. The host of
    the engine keeps them and returns where they are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, np.int32))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, np.float32))
        assert self.logprobs.shape == self.token_ids.shape, "one log-probability for each token"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAdapters:
    """The LoRA adapters that an engine applies in addition to the weights."""

    rank: int
    alpha: int
    """The output of an adapter is scaled by alpha / rank."""
    layers: Sequence[str]
    """Last parts of the names of the adapted layers: "q_proj"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine needs to start; its weights arrive by the first sync."""

    model_path: str
    """Hugging Face folder; only its config is read, and its tokenizer for texts."""
    dtype: str
    max_model_len: int
    stop_token_ids: Sequence[int]
    """Tokens that end a response."""
    config: RolloutConfig
    run_folder: str
    """As in `weight_sync.base.Link`."""
    is_apart: bool = False
    """Whether it runs in a process of its own; otherwise in one train worker or spread over
    several."""
    url: str = ""
    """URL of the server, if the engine is a server; "": it is none."""
    routing: Routing | None = None
    """The model's experts, if results must contain the experts of every token; None: they do
    not."""
    with_text: bool = False
    """Whether results contain their text."""
    adapters: EngineAdapters | None = None
    """Adapters that its weight syncs send; later syncs may send only them. None: there are none, or
    they are merged into the weights."""
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that are replaced for the engine; see `ModelFamily`."""


class RolloutEngine(UpdateSession, Protocol):
    """What a host asks of an engine. Every call blocks until it is done, and all come from one
    thread; `serving.py` ensures their order. New weights apply to running requests too: their
    cached keys and values of other weights are computed again.
    """

    def add(self, number: int, request: GenerationRequest) -> None:
        """Take a request; no other unfinished request has its number."""
        ...

    def step(self) -> Sequence[tuple[int, GenerationResult]]:
        """Draw at least one token of some requests; return those that have ended, by number.

        Raises:
            RolloutError: if a result is missing or malformed.
        """
        ...

    def abort(self, numbers: Sequence[int]) -> Sequence[tuple[int, GenerationResult]]:
        """Drop requests; return their tokens so far, ended by "abort"."""
        ...

    def any_rank(self, is_so: bool) -> bool:
        """Return whether `is_so` holds on any rank of the engine; all ranks call it after the same
        number of steps."""
        ...

    def sleep(self, level: int) -> None:
        """Free the device's memory: 1 keeps the weights in host memory, 2 drops them. The cache of
        running requests is dropped, and computed again when all parts are awake."""
        ...

    def wake(self, part: EnginePart) -> None:
        """Allocate the memory of a part again; the weights keep their values unless dropped."""
        ...

    def loaded_digests(self) -> list[dict[str, str]]:
        """Return the full digests of what the last session loaded, for each part of the engine:
        name of a parameter, as the engine calls it, -> type, shape and blake3 of its bits before
        the engine packed it. Empty unless the session was opened with digests.
        """
        ...

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        """Return the `loaded_digests` of an engine that starts from a Hugging Face folder with its
        own reader; afterwards the engine is without weights."""
        ...

    def close(self) -> None:
        """Free the engine's resources and close its receiver."""
        ...


class EngineFactory(Protocol):
    """Makes an engine."""

    def __call__(self, spec: EngineSpec, link: Link) -> RolloutEngine:
        """Return an engine without weights; they come by the receiver that `link` opens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """Properties of an engine that are known before its library is imported."""

    load: Callable[[], EngineFactory]
    """Imports its library."""
    has_texts: bool = True
    """Whether it knows the texts of tokens, so that a text can end a response."""
    cuts_heads: bool = False
    """Whether its ranks split heads, MLPs and experts, so the number of ranks must divide these."""


ENGINES: Registry[EngineKind] = Registry("rollout engine", "rollout.name")
