"""`rollout.stop` on real vLLM: texts that end a response, over the borders of tokens."""

from __future__ import annotations

import shutil

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mcore_rl.rollout.base import SamplingParams
from tests.carriers import make_request
from tests.integration import vllm_cases

MODEL = ("qwen3", "A")
REQUESTS = [
    make_request(
        prompt_token_ids=[1 + i, 4],
        sampling=SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=20, seed=i),
    )
    for i in range(8)
]


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    """The model with a tokenizer whose token 7 is the text "<7>"."""
    path = tmp_path_factory.mktemp("with_tokenizer") / "model"
    shutil.copytree(folders[MODEL], path)
    tokens = Tokenizer(WordLevel({f"<{i}>": i for i in range(61)}, unk_token="<0>"))
    tokens.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(path)
    return str(path)


def text_of(result):
    return "".join(f"<{token}>" for token in result.token_ids)


def test_a_response_ends_with_the_token_that_completes_the_text(in_vllm, folder):
    """Otherwise it is what it is without; end tokens still end a response."""
    in_vllm(vllm_cases.start, folder, stop_token_ids=[0])
    in_vllm(vllm_cases.sync, folder, 0)
    free = in_vllm(vllm_cases.generate, REQUESTS)
    third, fourth = list(free[0].token_ids)[2:4]
    stop = [f"{third}><{fourth}", "no such text"]
    in_vllm(vllm_cases.start, folder, stop_token_ids=[0], stop=stop)
    in_vllm(vllm_cases.sync, folder, 0)
    stopped = in_vllm(vllm_cases.generate, REQUESTS)
    for before, after in zip(free, stopped, strict=True):
        length = len(after.token_ids)
        assert list(after.token_ids) == list(before.token_ids)[:length]
        # float32 matrix products over batches of other sizes may round otherwise; 0.0 observed.
        assert after.logprobs == pytest.approx(before.logprobs[:length], abs=1e-5)
        if stop[0] in text_of(before):
            assert after.finish_reason == "stop"
            assert stop[0] in text_of(after)
            assert stop[0] not in text_of(after).removesuffix(f"<{after.token_ids[-1]}>")
        else:
            assert length == len(before.token_ids)
    assert len(stopped[0].token_ids) <= 4 < len(free[0].token_ids)
