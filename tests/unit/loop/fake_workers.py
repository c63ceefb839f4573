"""Two workers in one process behind the `WorkerGroup` protocol, with a model of one vector.

The policy ignores its context: every token is drawn from softmax(w / temperature). It trains for
real (autograd, the loop's own objective, plain gradient descent), reaches its engines through a
real weight sync, and is saved and loaded, so that a loop which forgets one of these ends with other
numbers. Everything that the loop asks for is written down.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import Call, done
from mcore_rl.cluster.placement import colocated
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, SftRunConfig
from mcore_rl.data.batch import pack, unpack
from mcore_rl.data.chat import decode_response
from mcore_rl.data.prompts import ItemStream
from mcore_rl.errors import StoppedError
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.stop import Stop
from mcore_rl.metrics import maximum, merge, to_host
from mcore_rl.rewards.base import CustomRewardConfig
from mcore_rl.rewards.custom import load_custom_reward
from mcore_rl.rewards.pool import Outcome
from mcore_rl.rewards.score import RewardScorer
from mcore_rl.rewards.worker import RewardCall, read_result
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import Layout, Prompt, RoutesAt, Share, TokenNumbers, VersionSpan, WriteState
from mcore_rl.weight_sync.base import Link, NamedTensors
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.intake import Intake, refuse
from mcore_rl.weight_sync.sync import sync_one
from mcore_rl.workers.roles import (
    Actor,
    Critic,
    Memory,
    Rollout,
    RouteHolder,
    SentWeights,
    WeightSource,
)
from tests.carriers import make_prompt, make_result

VOCABULARY = 12
END = 0


class UnigramEngine:
    """A `RolloutEngine` that answers with the weights it was given."""

    def __init__(self, temperature: float, link: Link) -> None:
        self.temperature = temperature
        self.intake = Intake(link, self.load)
        self.weight_version = -1
        self.weights = torch.zeros(0)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        return [self._draw(request) for request in requests]

    def _draw(self, request: GenerationRequest) -> GenerationResult:
        sampling = request.sampling
        temperature = sampling.temperature or self.temperature
        logprobs = torch.log_softmax(self.weights / temperature, dim=0)
        probabilities = logprobs.exp().tolist()
        source = random.Random(f"{sampling.seed}:{request.prompt_token_ids.tolist()}")
        tokens: list[int] = []
        while len(tokens) < sampling.max_tokens and END not in tokens:
            if sampling.temperature == 0:
                tokens.append(int(logprobs.argmax()))
            else:
                tokens += source.choices(range(VOCABULARY), probabilities)
        return make_result(
            token_ids=tokens,
            logprobs=[float(logprobs[token]) for token in tokens],
            finish_reason="stop" if END in tokens else "length",
            versions=[VersionSpan(self.weight_version, 0, len(tokens))],
        )

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weights = torch.zeros(0)
        self.coming_version = version
        self.intake.begin(version)

    def update_weights(self, update: Any) -> None:
        self.intake.receive(update)

    def load(self, tensors: NamedTensors) -> None:
        [(_, tensor)] = tensors
        self.weights = tensor.clone()

    def finish_weight_update(self, manifest: Manifest) -> None:
        refuse(self.intake.differences(manifest), self.coming_version)
        self.intake.end()
        self.weight_version = self.coming_version

    def abort_weight_update(self) -> None:
        self.intake.end()

    def loaded_digests(self) -> list[dict[str, str]]:
        return [{"w": str(self.weights.tolist())}]

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        self.weight_version = -1
        return [{"w": str(torch.linspace(0.0, 1.0, VOCABULARY).tolist())}]

    def close(self) -> None:
        pass


class UnigramActor:
    """The trained vector, its frozen copy and what a checkpoint keeps of it."""

    role = "actor"

    def __init__(self, temperature: float, learning_rate: float, save_takes: int) -> None:
        self.temperature, self.learning_rate = temperature, learning_rate
        self.weights = torch.linspace(0.0, 1.0, VOCABULARY)
        self.reference = self.weights.clone()
        self.num_begun = 0
        self.save_takes = save_takes
        self.pending_save: tuple[Path, str] | None = None

    def log_softmax(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(weights / self.temperature, dim=0)

    def forward(self, micro_batches, weights) -> TokenNumbers:
        batches = [pack(mb, pad_token_id=END, device="cpu") for mb in micro_batches]
        numbers = [unpack(self.output(weights, batch)[0], batch) for batch in batches]
        return TokenNumbers(
            indices=np.concatenate([mb.indices for mb in micro_batches]),
            lengths=np.concatenate([mb.lengths for mb in micro_batches]),
            numbers=np.concatenate(numbers),
        )

    def update(self, shares) -> list:
        """Do one update on the micro-batches of all ranks; return the metrics of each rank."""
        weights = self.weights.clone().requires_grad_(True)
        metrics = []
        for micro_batches, denominators, objective in shares:
            parts = []
            for micro_batch in micro_batches:
                batch = pack(micro_batch, pad_token_id=END, device="cpu")
                loss, part = objective(*self.output(weights, batch), batch, denominators)
                loss.backward()
                parts.append(part)
            metrics.append(to_host(merge(parts)))
        assert weights.grad is not None
        # A rate that depends on the schedule, so that a forgotten or repeated step shows.
        rate = self.learning_rate / self.num_begun
        self.weights = self.weights - rate * weights.grad
        metrics[0][f"{self.role}/grad_norm"] = maximum(float(weights.grad.norm()))
        metrics[0][f"{self.role}/lr"] = maximum(rate)
        return metrics

    def output(self, weights, batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (logprobs_T, entropy_T)."""
        logprobs_V = self.log_softmax(weights)
        entropy_T = -(logprobs_V.exp() * logprobs_V).sum().expand(len(batch.labels_T))
        return logprobs_V[batch.labels_T], entropy_T

    def begin_save(self, folder: str) -> None:
        assert self.pending_save is None
        state = {"weights": self.weights.tolist(), "num_begun": self.num_begun}
        self.pending_save = Path(folder) / "state.json", json.dumps(state)
        self.num_asked = 0

    def save_state(self, wait: bool) -> WriteState:
        assert self.pending_save is not None
        file, text = self.pending_save
        self.num_asked += 1
        if not wait and self.num_asked <= self.save_takes:
            file.write_text(text[: len(text) // 2])
            return WriteState(is_done=False)
        file.write_text(text)
        return WriteState(is_done=True)

    def finish_save(self) -> None:
        assert self.pending_save is not None
        self.pending_save = None

    def load(self, folder: str) -> None:
        state = json.loads((Path(folder) / "state.json").read_text())
        self.weights, self.num_begun = torch.tensor(state["weights"]), state["num_begun"]


class UnigramCritic(UnigramActor):
    """Learns a value for each token that a state may end with."""

    role = "critic"

    def output(self, weights, batch):
        """Return (values_T, None)."""
        return weights[batch.input_ids_T], None


def fake_routes(num_inputs: int, step: int | None) -> np.ndarray:
    """Return routes of one layer that tell the step in which they were made."""
    return np.full((num_inputs, 1, 1), step, np.uint8)


class CrashError(Exception):
    """Stands for the death of the process."""


class FakeWorkers:
    """A `WorkerGroup` of two ranks, each with an engine.

    `calls` is what was asked, in order, `versions` the engines' version at the time of each call,
    `steps` the step that a failure of the call would name.

    Args:
        temperature: of engines and actor.
        learning_rate: of the actor.
        crash_at: (method, number): the crash comes in place of that call, counted from 0.
        ask_at: (method, number): the run is asked to end as that call begins, counted from 0.
        stop: by which it is asked.
        engine: class of the engines.
        transport: of their weights.
        run_folder: for a transport that needs it.
        save_takes: how often a checkpoint is asked for in vain before it is written.
        save_problem: why rank 1 cannot write its part of any.
    """

    world_size = 2

    def __init__(
        self,
        temperature: float = 1.0,
        learning_rate: float = 5.0,
        crash_at: tuple[str, int] | None = None,
        ask_at: tuple[str, int] | None = None,
        stop: Stop | None = None,
        engine: type[UnigramEngine] = UnigramEngine,
        transport: str = "direct",
        run_folder: Path = Path(),
        save_takes: int = 0,
        save_problem: str = "",
    ) -> None:
        self.actor = UnigramActor(temperature, learning_rate, save_takes)
        self.critic = UnigramCritic(temperature, 1.0, save_takes)
        self.save_problem = save_problem
        links = [
            Link(transport=transport, run_folder=str(run_folder), engine=rank, engine_rank=0)
            for rank in range(self.world_size)
        ]
        self.senders = [link.open_sender() for link in links]
        self.engines = [engine(temperature, link) for link in links]
        self.crash_at, self.ask_at, self.stop = crash_at, ask_at, stop or Stop()
        self.is_interrupted = self.is_paused = False
        self.calls: list[tuple[str, Any]] = []
        self.versions: list[int] = []
        self.drawn: dict[int, list[list[list[GenerationResult]]]] = {}
        """By number of the call: of each rank, its groups."""
        self.routes: dict[tuple[int, int, int], np.ndarray] = {}
        """By rank that has them, rank that recorded them, and key."""
        self.replayed: list[list[np.ndarray]] = []
        """What each update was given, over both ranks."""
        self.step: int | None = None
        self.steps: list[int | None] = []

    @property
    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]

    def submit(self, calls: Mapping[int, Call[Any]]) -> dict[int, Any]:
        (method,) = {call.method for call in calls.values()}
        if method == Rollout.answer:
            return {rank: done(self.drawn_of(rank, *call.args)) for rank, call in calls.items()}
        if method == RouteHolder.exchange:
            return self.exchange({rank: call.args for rank, call in calls.items()})
        if method == Rollout.digests_of_model:
            assert list(calls) == [0], "one engine reads the folder"
        else:
            assert list(calls) == list(range(self.world_size)), "every rank is asked"
        name = calls[0].name.removeprefix("rollout.").removeprefix("weight_source.")
        answers = self.answer(method, name, [call.args for call in calls.values()])
        return {rank: done(answer) for rank, answer in enumerate(answers)}

    def answer(self, called: Any, method: str, args_of_rank: Sequence[tuple[Any, ...]]) -> list:
        number = self.methods.count(method)
        self.calls.append((method, args_of_rank))
        self.versions.append(self.engines[0].weight_version)
        self.steps.append(self.step)
        if self.crash_at == (method, number):
            raise CrashError(f"{method} {number}")
        if self.ask_at == (method, number):
            self.stop.ask()
        model = self.critic if method.startswith("critic.") else self.actor
        match called:
            case Critic.values:
                return [model.forward(mb, model.weights) for (mb,) in args_of_rank]
            case Rollout.generate:
                self.drawn[args_of_rank[0][0]] = [
                    [] if self.is_interrupted else self.drawn_by(rank, groups)
                    for rank, (_, groups, _) in enumerate(args_of_rank)
                ]
            case Memory.take_peak:
                return [None, 5 << 30]
            case Rollout.pause | Rollout.resume:
                assert self.is_paused == (called == Rollout.resume)
                self.is_paused = not self.is_paused
            case WeightSource.send_weights:
                export = [[("w", self.actor.weights)]]
                sent = Manifest()
                sent.add(export[0])
                return [
                    SentWeights(
                        sync_one(export, sender, engine, version, with_digests), {}, sent.texts()
                    )
                    for sender, engine, (version, _, with_digests, _) in zip(
                        self.senders, self.engines, args_of_rank, strict=True
                    )
                ]
            case Rollout.digests_of_model | Rollout.loaded_digests:
                if called == Rollout.digests_of_model:
                    return [self.engines[0].digests_of_folder("")]
                return [engine.loaded_digests() for engine in self.engines]
            case Actor.logprobs:
                return [self.actor.forward(mb, self.actor.weights) for (mb,) in args_of_rank]
            case Actor.record_logprobs:
                logprobs = [self.actor.forward(mb, self.actor.weights) for (mb,) in args_of_rank]
                return [
                    (
                        of_rank,
                        {
                            index: self.keep(rank, fake_routes(length - 1, step=self.step))
                            for index, length in zip(
                                of_rank.indices.tolist(), of_rank.lengths.tolist(), strict=True
                            )
                        },
                    )
                    for rank, of_rank in enumerate(logprobs)
                ]
            case RouteHolder.drop:
                self.routes.clear()
            case Actor.ref_logprobs:
                return [self.actor.forward(mb, self.actor.reference) for (mb,) in args_of_rank]
            case Actor.begin_step | Critic.begin_step:
                model.num_begun += 1
            case Actor.update | Critic.update:
                shares = [(rank, share) for rank, (share, *_) in enumerate(args_of_rank)]
                self.replayed.append([x for pair in shares for x in self.routes_of(*pair)])
                return model.update(args_of_rank)
            case Actor.begin_save | Critic.begin_save:
                model.begin_save(args_of_rank[0][0])
            case Actor.save_state | Critic.save_state:
                state = model.save_state(args_of_rank[0][0])
                return [state, replace(state, problem=self.save_problem)]
            case Actor.finish_save | Critic.finish_save:
                model.finish_save()
            case Actor.load | Critic.load:
                model.load(args_of_rank[0][0])
            case _:
                raise AssertionError(f"the loop asked for {method}")
        return [None] * self.world_size

    def drawn_by(
        self, rank: int, groups: Sequence[Sequence[GenerationRequest]]
    ) -> list[list[GenerationResult]]:
        """Return what the engine of a rank draws."""
        requests = [request for group in groups for request in group]
        results = iter(self.engines[rank].generate(requests))
        return [[self.handed_out(rank, next(results)) for _ in group] for group in groups]

    def drawn_of(self, rank: int, number: int, group: int) -> list[GenerationResult]:
        """Return what it has drawn for a group of a call."""
        return [] if self.is_interrupted else self.drawn[number][rank][group]

    def handed_out(self, rank: int, result: GenerationResult) -> GenerationResult:
        """Return the result as the host of the engine does."""
        text = decode_response(make_tokenizer(), result.token_ids.tolist())
        routes = result.routed_experts
        if isinstance(routes, np.ndarray):
            return replace(result, text=text, routed_experts=self.keep(rank, routes))
        return replace(result, text=text)

    def keep(self, rank: int, routes: np.ndarray) -> RoutesAt:
        at = RoutesAt(rank=rank, key=len(self.routes))
        self.routes[rank, at.rank, at.key] = routes
        return at

    def exchange(self, args: Mapping[int, tuple[Any, Any]]) -> dict[int, Any]:
        for rank, (gives, _) in args.items():
            for other, keys in gives.items():
                taken = args[other][1][rank]
                for key, (same, num_inputs) in zip(keys.tolist(), taken.tolist(), strict=True):
                    routes = self.routes[rank, rank, key]
                    assert (same, num_inputs) == (key, len(routes))
                    assert (other, rank, key) not in self.routes, "they were given before"
                    self.routes[other, rank, key] = routes
        return dict.fromkeys(args, done(None))

    def routes_of(self, rank: int, share: Share) -> list[np.ndarray]:
        """Return the routes of the sequences of a share as its rank has them."""
        if share.whole.routes_at is None:
            return []
        return [self.routes[rank, at, key] for at, key in share.whole.routes_at.tolist()]

    def interrupt(self) -> None:
        self.is_interrupted = True

    def close(self) -> None:
        raise AssertionError("a loop leaves its workers to whoever started them")


REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    words = solution_str.split()
    return words.count(ground_truth) - 0.1 * len(words)
"""


def make_prompts(num: int, first: int, source: str) -> list[Prompt]:
    return [
        make_prompt(
            uid=f"{source}:{first + i}",
            token_ids=[1 + (first + i) % 5, 2, 3 + (first + i) // 5][: 1 + i % 3],
            text="",
            data_source=source,
            ground_truth=f"w{1 + i % 4}",
        )
        for i in range(num)
    ]


@functools.cache
def make_tokenizer() -> Any:
    """Return a real tokenizer whose token i is the word w<i>; token 0 ends a response."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="w0")


def make_config(*overrides: str, folder: object = None) -> RunConfig:
    """Return the configuration of a small run, of a run in `folder` if there is one."""
    base = [
        "data.train_batch_size=4",
        "data.max_prompt_length=4",
        "data.max_response_length=6",
        "data.train_files=unread",
        "model.path=unread",
        "actor.megatron.dtype=float32",
        "actor.ppo_mini_batch_size=2",
        "rollout.n=3",
        "reward.num_workers=1",
        "trainer.logger=[]",
    ]
    config = copy.deepcopy(_compose(*base, *overrides))
    if folder is not None:
        config.trainer.default_local_dir = str(folder)
    return config


@functools.cache
def _compose(*overrides: str) -> RunConfig:
    return compose_config(RunConfig, parse_command_line("train", "", overrides))


class ScoringHere:
    """Calls the custom function in this process, one response after the other."""

    def __init__(self, custom: CustomRewardConfig) -> None:
        loaded = load_custom_reward(custom)
        assert loaded is not None
        self._function = loaded.function
        self._is_interrupted = False

    def start(self) -> None:
        """Have nothing to start."""

    def run(self, calls: Sequence[RewardCall]) -> Iterator[tuple[int, Outcome]]:
        for position, call in enumerate(calls):
            if self._is_interrupted:
                raise StoppedError
            try:
                found = read_result(self._function(**call.arguments))
            except Exception as error:  # noqa: BLE001  whatever a function raises is an outcome
                yield position, Outcome(error=f"{type(error).__name__}: {error}")
            else:
                yield position, Outcome(**found)

    def interrupt(self) -> None:
        self._is_interrupted = True

    def close(self) -> None:
        """Hold nothing."""


def make_inputs(reward_file: Path, cfg: RunConfig, total_steps: int, num_val: int) -> RunInputs:
    custom = CustomRewardConfig(path=str(reward_file))
    return RunInputs(
        prompts=ItemStream(make_prompts(10, 0, "train"), seed=cfg.data.seed),
        val_prompts=make_prompts(num_val, 100, "val"),
        scorer=RewardScorer(cfg.reward, custom, ScoringHere(custom)),
        stop_token_ids=[END],
        token_texts=lambda ids: [f" {i}" for i in ids],
        total_steps=total_steps,
    )


def make_cluster(
    workers: FakeWorkers, cfg: RunConfig | SftRunConfig, engine_size: int | None = 1
) -> Cluster:
    critic_cut = None
    if isinstance(cfg, RunConfig) and cfg.has_critic:
        critic_cut = cfg.critic.cut_over(1)
    placement = colocated(Layout(dp=workers.world_size), workers.world_size, engine_size)
    group: Any = workers
    return Cluster.of(group, placement, cfg.actor.cut, critic_cut)
