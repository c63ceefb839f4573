"""The configurations among which `mcore-rl plan --suggest` chooses.

A candidate is the run's own configuration with other sizes; everything else stays the same. Keys
set on the command line stay; values set by a recipe are only one proposal among others.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mcore_rl.config.run import RunConfig

MEGATRON = "actor.megatron."
LAYOUT_KEYS = {
    "tp": f"{MEGATRON}tensor_model_parallel_size",
    "pp": f"{MEGATRON}pipeline_model_parallel_size",
    "cp": f"{MEGATRON}context_parallel_size",
    "ep": f"{MEGATRON}expert_model_parallel_size",
    "etp": f"{MEGATRON}expert_tensor_parallel_size",
}
BUDGET = "actor.ppo_max_token_len_per_gpu"
RECOMPUTE = f"{MEGATRON}override_transformer_config"
OFFLOADS = tuple(f"{MEGATRON}{part}_offload" for part in ("param", "grad", "optimizer"))
SLEEP = "rollout.sleep_level"
ENGINE_SIZE = "rollout.tensor_model_parallel_size"
ENGINE_SHARE = "rollout.gpu_memory_utilization"
HOST = "rollout.host"
NODES = ("trainer.nnodes", "trainer.n_gpus_per_node")
ENGINE_NODES = ("rollout.nnodes", "rollout.n_gpus_per_node")

FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.85)
"""Shares of a device's memory for an engine, alone on it or in turn with the trainer."""

NO_TURNS = {**dict.fromkeys(OFFLOADS, False), SLEEP: 0}
"""Values for a trainer and engines on devices of their own."""

Values = Mapping[str, Any]
"""By key of the configuration."""


def with_values(cfg: RunConfig, values: Values) -> RunConfig:
    """Return the configuration with other values of some keys.

    Raises:
        UserError: if a section refuses its own.
    """
    return _with_values(cfg, {tuple(key.split(".")): value for key, value in values.items()})


def _with_values(section: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    """Return a section with other values, all set at once: they may only fit together."""
    own = {names[0]: value for names, value in values.items() if len(names) == 1}
    below: dict[str, dict[tuple[str, ...], Any]] = {}
    for (name, *rest), value in values.items():
        if rest:
            below.setdefault(name, {})[tuple(rest)] = value
    inner = {name: _with_values(getattr(section, name), found) for name, found in below.items()}
    return replace(section, **own, **inner)


def value_of(cfg: RunConfig, key: str) -> Any:
    """Return the value of a key."""
    node: Any = cfg
    for name in key.split("."):
        node = getattr(node, name)
    return node


class Space:
    """What may be chosen.

    Args:
        cfg: the run as it is configured.
        fixed: keys that the user has set.
        has_experts: of the model.
    """

    def __init__(self, cfg: RunConfig, fixed: Collection[str], has_experts: bool) -> None:
        self.cfg, self._fixed, self._has_experts = cfg, set(fixed), has_experts

    def placements(self) -> Iterator[Values]:
        """Yield placements of trainer and engines: on the same devices, or on separate ones.

        The devices are those of the configuration, the engines' own among them.
        """
        trainer, rollout = self.cfg.trainer, self.cfg.rollout
        per_node = trainer.n_gpus_per_node
        is_fixed = self._fixed & {HOST, *ENGINE_NODES}
        if is_fixed or rollout.host == "server":
            yield {}
            return
        nodes = trainer.nnodes + rollout.nnodes
        yield {HOST: "in_process", ENGINE_NODES[0]: 0, ENGINE_NODES[1]: None, NODES[0]: nodes}
        if self.cfg.actor.router_replay.mode == "R3":
            return  # routes of an engine elsewhere reach no worker
        whole, unit = (nodes, 1) if nodes > 1 else (per_node, 0)
        for part in sorted({whole // 4, whole // 2, 3 * whole // 4} - {0, whole}):
            engines = (part, per_node) if unit else (1, part)
            own = (whole - part, per_node) if unit else (1, whole - part)
            keys = (*ENGINE_NODES, *NODES)
            chosen = {HOST: "process", **dict(zip(keys, (*engines, *own), strict=True))}
            yield chosen | {key: v for key, v in NO_TURNS.items() if key not in self._fixed}

    def layouts(self, placed: RunConfig) -> Iterator[Values]:
        """Yield the parallel sizes that divide the trainer's devices."""
        world, per_node = placed.trainer.world_size, placed.trainer.n_gpus_per_node
        all_sizes = [n for n in range(1, world + 1) if world % n == 0]
        near = [n for n in all_sizes if n <= per_node]
        experts = all_sizes if self._has_experts else [1]
        choices = {"tp": near, "pp": all_sizes, "cp": near, "ep": experts}
        sizes = [self._of(LAYOUT_KEYS[name], found) for name, found in choices.items()]
        for tp, pp, cp, ep in itertools.product(*sizes):
            if world % (tp * pp * cp):
                continue
            free = sorted({1, tp}) if self._has_experts else [None]
            for etp in self._of(LAYOUT_KEYS["etp"], free):
                if world % ((etp or tp) * ep * pp) == 0:
                    names = LAYOUT_KEYS.values()
                    yield dict(zip(names, (tp, pp, cp, ep, etp), strict=True))

    def training(self, laid_out: RunConfig) -> Iterator[Values]:
        """Yield the tokens of a micro-batch and whether layers are computed again."""
        longest = laid_out.data.max_prompt_length + laid_out.data.max_response_length
        cp = laid_out.actor.megatron.context_parallel_size
        least = -(-longest // cp)
        budgets = [laid_out.actor.ppo_max_token_len_per_gpu]
        if laid_out.actor.ppo_micro_batch_size_per_gpu is None:
            budgets = self._of(BUDGET, sorted({least, 2 * least}))
        given = laid_out.actor.megatron.override_transformer_config
        overrides = [given]
        if not any(key.startswith(RECOMPUTE) for key in self._fixed):
            plain = {key: v for key, v in given.items() if not key.startswith("recompute_")}
            overrides = [plain, plain | FULL_RECOMPUTE]
        for budget, override in itertools.product(budgets, overrides):
            yield {BUDGET: budget, RECOMPUTE: override}

    def turns(self, placed: RunConfig) -> Iterator[Values]:
        """Yield what is offloaded while it is not needed."""
        is_apart = placed.rollout.nnodes > 0 or placed.rollout.host == "server"
        choices = [(False, 0)] if is_apart else [(False, 0), (False, 2), (True, 0), (True, 2)]
        for leaves, level in choices:
            values = NO_TURNS | dict.fromkeys(OFFLOADS, leaves) | {SLEEP: level}
            yield {key: v for key, v in values.items() if key not in self._fixed}

    def engines(self, placed: RunConfig) -> Iterator[Values]:
        """Yield the devices of an engine and its share of them."""
        rollout = placed.rollout
        per_node = rollout.n_gpus_per_node or placed.trainer.n_gpus_per_node
        sizes = self._of(ENGINE_SIZE, [n for n in range(1, per_node + 1) if per_node % n == 0])
        shares = self._of(ENGINE_SHARE, SHARES)
        if rollout.kv_cache_memory_bytes is not None:
            shares = [rollout.gpu_memory_utilization]
        for size, share in itertools.product(sizes, shares):
            yield {ENGINE_SIZE: size, ENGINE_SHARE: share}

    def _of(self, key: str, choices: Sequence[Any]) -> Sequence[Any]:
        return [value_of(self.cfg, key)] if key in self._fixed else choices
