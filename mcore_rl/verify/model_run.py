"""What the processes of `mcore-rl verify model` do: generate, score, record the layers.

    python -m mcore_rl.verify.model_run model.path=... trainer.default_local_dir=WORK ...

The configuration, the launcher, the workers and the weight sync are those of a training run. The
prompts are read from `WORK/prompts.json`; where an engine is wanted, it continues them after two
syncs and its tokens become part of the sequences. Log-probabilities and outputs of layers are left
in `WORK`, and compared by `model.py`; what an engine has loaded is compared here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.models.safetensors_io import plan_shards, write_checkpoint
from mcore_rl.models.spec import engine_overrides
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, SamplingParams
from mcore_rl.run.command import run_command
from mcore_rl.run.specs import start_cluster
from mcore_rl.types import TokenSequence
from mcore_rl.verify.runs import check_sizes

MODULE = "mcore_rl.verify.model_run"
STARTED_FILE = "started"
"""Is there as soon as all workers are up, the engines too."""
LOADED_FILE = "loaded"
"""How many parameters of an engine are those of the folder, after both syncs."""
LAYERS_FOLDER = "layers"
"""Outputs of the modules, as `layer_output_name` calls them."""
_PROMPTS_FILE, _SCORED_FILE = "prompts.json", "scored.json"

Response = tuple[Sequence[int], Sequence[float]]
"""(tokens, log-probabilities) of an engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the run is asked to do."""

    token_ids: Sequence[Sequence[int]]
    max_tokens: int
    """Tokens by which the engine continues each; 0: no engine is started."""
    seed: int

    def write(self, work: Path) -> None:
        (work / _PROMPTS_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, work: Path) -> Prompts:
        return cls(**json.loads((work / _PROMPTS_FILE).read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One sequence with the log-probabilities of the trainer and, of its response, the engine."""

    token_ids: Sequence[int]
    megatron: Sequence[float]
    """Of every token but the first, which nothing predicts."""
    engine: Sequence[float]
    """Of the last tokens, which the engine generated; empty without an engine."""


def read_scored(work: Path) -> list[Scored]:
    """Return what the run found for each prompt."""
    rows = json.loads((work / _SCORED_FILE).read_text(encoding="utf-8"))
    return [Scored(**row) for row in rows]


def layer_output_name(number: int, module: str) -> str:
    """Return the name of a module's output [tokens - 1, H] for sequence `number`."""
    return f"{number}.{module}"


def run(cfg: RunConfig, workers: ChannelWorkers) -> None:
    """Score the prompts and leave what came out in the folder."""
    work = Path(cfg.trainer.default_local_dir)
    prompts = Prompts.read(work)
    engine = EngineSpec(
        model_path=str(cfg.model.path),
        dtype=cfg.actor.megatron.dtype,
        max_model_len=max(map(len, prompts.token_ids)) + prompts.max_tokens,
        stop_token_ids=[],
        config=cfg.rollout,
        run_folder=str(work),
        config_overrides=engine_overrides(cfg.model.folder),
    )
    cluster = start_cluster(
        cfg,
        workers,
        total_steps=1,
        temperature=cfg.rollout.temperature,
        engine=engine if prompts.max_tokens else None,
    )
    (work / STARTED_FILE).touch()
    responses: list[Response] = [([], [])] * len(prompts.token_ids)
    if prompts.max_tokens:
        wanted = cluster.engines.digests_of_model()
        for version in (0, 1):  # one may be right only into an engine that has no weights
            num_compared = cluster.engines.sync_and_compare(version, wanted)
        (work / LOADED_FILE).write_text(str(num_compared), encoding="utf-8")
        responses = _generate(cluster, prompts)
    sequences = [
        TokenSequence(
            token_ids=np.array([*prompt, *tokens], np.int32),
            loss_mask=np.arange(len(prompt) + len(tokens)) > 0,
        )
        for prompt, (tokens, _) in zip(prompts.token_ids, responses, strict=True)
    ]
    logprobs = cluster.trainer.logprobs(sequences)
    _write_layers(work / LAYERS_FOLDER, cluster, sequences)
    cluster.close()
    scored = [
        Scored(
            token_ids=sequence.token_ids.tolist(),
            megatron=values[1:].tolist(),
            engine=by_engine,
        )
        for sequence, values, (_, by_engine) in zip(sequences, logprobs, responses, strict=True)
    ]
    text = json.dumps([asdict(row) for row in scored])
    (work / _SCORED_FILE).write_text(text, encoding="utf-8")


def _engine(cfg: RunConfig) -> str:
    """Return the name of the engine that is started; "": none."""
    prompts = Prompts.read(Path(cfg.trainer.default_local_dir))
    return cfg.rollout.name if prompts.max_tokens else ""


def _generate(cluster: Cluster, prompts: Prompts) -> list[Response]:
    """Return what the engines add to each prompt."""
    groups = [
        [
            GenerationRequest(
                prompt_token_ids=np.array(prompt, np.int32),
                sampling=SamplingParams(
                    temperature=1.0,
                    top_p=1.0,
                    top_k=-1,
                    max_tokens=prompts.max_tokens,
                    seed=prompts.seed + number,
                ),
            )
        ]
        for number, prompt in enumerate(prompts.token_ids)
    ]
    answered = cluster.engines.generate(groups)
    return [(r.token_ids.tolist(), r.logprobs.tolist()) for (r,) in answered]


def _write_layers(folder: Path, cluster: Cluster, sequences: Sequence[TokenSequence]) -> None:
    tensors = [
        (layer_output_name(number, module), torch.from_numpy(output))
        for number, outputs in enumerate(cluster.trainer.layer_outputs(sequences))
        for module, output in outputs.items()
    ]
    write_checkpoint(folder, tensors, plan_shards(tensors))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of every process of the run."""
    run_command(
        MODULE,
        "Score prompts; started by `mcore-rl verify model`.",
        sys.argv[1:] if argv is None else argv,
        RunConfig,
        check_sizes,
        run,
        engine=_engine,
    )


if __name__ == "__main__":
    main()
