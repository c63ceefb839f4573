"""A run of real workers and engines through the weights A -> B -> A: what engines and trainer say.

    python -m agreement_run model.path=... trainer.default_local_dir=WORK ...

B is A after an update of the trainer, and A comes back from a checkpoint. After every sync all
engines answer the same prompts, the trainer scores the answers, and what the engines have loaded is
compared bit by bit: with the model's folder where the weights are A, among the engines always.
`WORK/agreement.json` has what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mcore_rl.algorithms.objective import resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.models.spec import engine_overrides
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, SamplingParams
from mcore_rl.run.command import run_command
from mcore_rl.run.specs import start_cluster
from mcore_rl.types import TokenSequence
from mcore_rl.verify.runs import check_sizes

PROMPTS = ([5], [7, 8, 9], [3] * 20, [(7 * i) % 61 for i in range(140)])
NUM_TOKENS = 8


def answers(cluster: Cluster) -> tuple[list[TokenSequence], dict]:
    """Return what all engines answer to the prompts, and how far the trainer is from it."""
    prompts = [prompt for prompt in PROMPTS for _ in range(cluster.engines.num_engines)]
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=NUM_TOKENS, seed=3)
    groups = [
        [GenerationRequest(prompt_token_ids=np.array(p, np.int32), sampling=sampling)]
        for p in prompts
    ]
    found = [result for (result,) in cluster.engines.generate(groups)]
    sequences = [
        TokenSequence(
            token_ids=np.array([*prompt, *result.token_ids], np.int32),
            loss_mask=np.arange(len(prompt) + len(result.token_ids)) >= len(prompt),
            advantages=np.linspace(1, -1, len(prompt) + len(result.token_ids), dtype=np.float32),
        )
        for prompt, result in zip(prompts, found, strict=True)
    ]
    scored = cluster.trainer.logprobs(sequences)
    differences = [
        np.abs(by_trainer[-len(result.token_ids) :] - result.logprobs).max()
        for by_trainer, result in zip(scored, found, strict=True)
    ]
    said = [(result.token_ids.tolist(), result.logprobs.tolist()) for result in found]
    return sequences, {"largest": float(max(differences)), "said": said}


def run(cfg: RunConfig, workers: ChannelWorkers) -> None:
    work = Path(cfg.trainer.default_local_dir)
    engine = EngineSpec(
        model_path=str(cfg.model.path),
        dtype="float32",
        max_model_len=256,
        stop_token_ids=[],
        config=cfg.rollout,
        run_folder=str(work),
        config_overrides=engine_overrides(cfg.model.folder),
    )
    cluster = start_cluster(cfg, workers, total_steps=2, temperature=1.0, engine=engine)
    of_folder = cluster.engines.digests_of_model()
    num_loaded = [cluster.engines.sync_and_compare(0, of_folder)]
    sequences, of_a = answers(cluster)
    cluster.trainer.begin_save(str(work))
    cluster.trainer.end_save(wait=True)

    cluster.trainer.begin_step()
    objective = PolicyObjective(resolve_objective(cfg.actor, NUM_TOKENS), log_entropy=False)
    cluster.trainer.update(sequences, objective)
    num_loaded.append(cluster.engines.sync_and_compare(1))
    _, of_b = answers(cluster)

    cluster.trainer.load(str(work))
    num_loaded.append(cluster.engines.sync_and_compare(2, of_folder))
    _, of_a_again = answers(cluster)
    cluster.close()
    found = {"syncs": [of_a, of_b, of_a_again], "num_loaded": num_loaded}
    (work / "agreement.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    run_command(
        "agreement_run", "A -> B -> A.", sys.argv[1:], RunConfig, check_sizes, run, engine=name
    )


def name(cfg: RunConfig) -> str:
    return cfg.rollout.name


if __name__ == "__main__":
    main()
