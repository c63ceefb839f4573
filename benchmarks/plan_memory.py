"""The memory that a plan estimates beside the memory that a run measures, on CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py
    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py --only dense_tp2 moe_ep2

Each configuration is a run of two steps by the training command, which writes `memory.json` at its
end: by phase what the fullest worker's resident set grew to, since before anything was built,
beside the estimate; and what stays at the end, when all that is freed has been given back to the
system. The last is what the models, their optimizer, an engine and copies in host memory hold, and
is to be within 15 percent; exit code 1 otherwise. The peak is shown beside it: it also has what the
local layers on CPU keep in an update, which the plan counts for fused kernels, and memory that
glibc has not given back yet.

Models are random, of float32 unless a name says otherwise, and as large as it takes for half a GB
and more in each worker; at most two workers run at a time. What the plan does not count is there
too: libraries that are read when they are first used, interpreter objects and sockets, 0.05 to
0.2 GB with the fake engine, 0.25 with vLLM in the worker; models with experts are larger for it.
Wants 8 GiB of memory, 4 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOST_OFF = 0.15
LEAST_GB = 0.5

DENSE = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
}
MLA = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 384,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    model: dict[str, Any]
    times: float = 1.0
    """As many layers as the model says, times this."""
    options: Sequence[str] = ()
    processes: int = 1


MEGATRON = "actor.megatron."
TP2, PP2 = f"{MEGATRON}tensor_model_parallel_size=2", f"{MEGATRON}pipeline_model_parallel_size=2"
EP2 = f"{MEGATRON}expert_model_parallel_size=2"
VPP2 = f"{MEGATRON}virtual_pipeline_model_parallel_size=2"
OFFLOADS = [f"{MEGATRON}{part}_offload=true" for part in ("param", "grad", "optimizer")]
VLLM = ["rollout.name=vllm", "rollout.kv_cache_memory_bytes=67108864"]

CASES = {
    "dense": Case(model=DENSE),
    "dense_bfloat16": Case(model=DENSE, options=[f"{MEGATRON}dtype=bfloat16"]),
    "dense_offload": Case(model=DENSE, options=[*OFFLOADS, "rollout.host=process"]),
    "dense_kl": Case(model=DENSE, options=["actor.use_kl_loss=true"]),
    "dense_critic": Case(model=DENSE, options=["algorithm.adv_estimator=gae"]),
    "dense_tp2": Case(model=DENSE, times=2, options=[TP2], processes=2),
    "dense_pp2_vpp2": Case(model=DENSE, times=2, options=[PP2, VPP2], processes=2),
    "dense_dp2_whole_optimizer": Case(
        model=DENSE, options=[f"{MEGATRON}use_distributed_optimizer=false"], processes=2
    ),
    "moe": Case(model=MOE),
    "moe_ep2": Case(model=MOE, times=3, options=[EP2], processes=2),
    "latent_moe_pp2": Case(model=MLA, times=2, options=[PP2], processes=2),
    "moe_engine": Case(model=MOE, times=2, options=VLLM),
    "dense_engine_apart": Case(model=DENSE, options=[*VLLM, "rollout.host=process"]),
}


def make_model(folder: Path, case: Case) -> None:
    """Write a random model with the tokenizer of the quickstart."""
    sys.path.insert(0, str(HERE.parent / "examples" / "quickstart"))
    import torch
    from make_model import char_tokenizer, with_chat_template
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = with_chat_template(char_tokenizer(), 256)
    layers = round(case.model["num_hidden_layers"] * case.times)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    sizes |= {"tie_word_embeddings": False, "num_hidden_layers": layers}
    config = AutoConfig.for_model(**{**case.model, **sizes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(case: Case, folder: Path) -> dict[str, tuple[float, float]]:
    """Run the case and return (estimated, measured) GiB by phase."""
    make = [sys.executable, __file__, "--make", str(folder / "model"), json.dumps(case.model)]
    subprocess.run([*make, str(case.times)], check=True, stdout=subprocess.DEVNULL)
    rows = [
        {"prompt": f"{i}+{i}=", "ground_truth": str(2 * i), "data_source": "s"} for i in range(16)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [
        *[f"model.path={folder / 'model'}", f"data.train_files={folder / 'train.jsonl'}"],
        *["data.train_batch_size=4", "data.max_prompt_length=16", "data.max_response_length=16"],
        *["actor.ppo_mini_batch_size=4", "actor.ppo_micro_batch_size_per_gpu=2"],
        *[
            "actor.megatron.dtype=float32",
            "rollout.name=fake",
            "rollout.logprob_tolerance=1e9",
            "rollout.compare_loaded_weights=false",
            "rollout.n=2",
        ],
        *["trainer.total_training_steps=2", "trainer.export_hf_model=false", "trainer.logger=[]"],
        *[f"trainer.n_gpus_per_node={case.processes}", f"trainer.default_local_dir={folder}/run"],
        f"custom_reward_function.path={folder / 'reward.py'}",
    ]
    (folder / "reward.py").write_text(REWARD)
    given = {option.split("=")[0]: option for option in [*options, *case.options]}
    command = [sys.executable, "-m", "mcore_rl.train", "--config-name", "grpo", *given.values()]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    found = json.loads((folder / "run" / "memory.json").read_text())["rows"]
    return {row["phase"]: (row["estimated_gib"], row["measured_gib"]) for row in found}


REWARD = '''"""Digits of a response, as a share."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(character.isdigit() for character in solution_str) / 16
'''


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", default=None, help="for models and runs; default: temporary")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        folder, model, times = args.make
        make_model(Path(folder), Case(model=json.loads(model), times=float(times)))
        return
    print(
        f"{'':28} {'held at the end, GB':>24} {'':>6}  {'peak of an update, GB':>24} {'':>6}\n"
        f"{'configuration':28} {'estimated':>12}{'measured':>12} {'ratio':>6}  "
        f"{'estimated':>12}{'measured':>12} {'ratio':>6}"
    )
    failed = False
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows = measure(CASES[name], Path(folder))
        cells = []
        for row in ("end of the run", "train"):
            estimated, measured = (gib * 2**30 / 1e9 for gib in rows[row])
            cells.append(f"{estimated:12.3f}{measured:12.3f} {estimated / measured:6.3f}")
        estimated, measured = rows["end of the run"]
        is_off = abs(estimated / measured - 1) > MOST_OFF
        is_small = measured * 2**30 / 1e9 < LEAST_GB
        failed |= is_off or is_small
        note = ("  OFF" if is_off else "") + ("  SMALL" if is_small else "")
        print(f"{name:28} {'  '.join(cells)}{note}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
