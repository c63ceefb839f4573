"""vLLM alone on the requests of a step, for `rl_step.py`.

One engine as a run has it, without a trainer beside it. Says that it is ready and for each line on
standard input answers all requests once; prints the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, as in a run
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm


def main() -> None:
    given = json.loads(sys.argv[1])
    engine = vllm.LLM(
        given["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=given["max_model_len"],
        max_num_seqs=256,
        kv_cache_memory_bytes=given["kv_cache_memory_bytes"],
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    params = [
        vllm.SamplingParams(
            max_tokens=given["response"],
            ignore_eos=True,
            seed=number,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        for number in range(len(prompts))
    ]
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert {len(output.outputs[0].token_ids) for output in outputs} == {given["response"]}
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
