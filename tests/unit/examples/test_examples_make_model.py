"""The made checkpoint is an ordinary one: transformers loads it, its template is exact."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SMALL = ["--hidden-size", "64", "--layers", "1", "--heads", "2", "--experts", "4"]
# JSON allows U+2028 unescaped inside a string; str.splitlines would cut the row there.
TEXTS = ["How much is 12 + 30?", "It is 42.\n#### 42", "Euro: \u20ac, a line\u2028and another"]


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    make_model.main(["--out", str(out), "--seed", "3", *SMALL])
    return out


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def bpe_checkpoint(make_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("bpe")
    rows = [json.dumps({"question": text, "n": 1}, ensure_ascii=False) for text in TEXTS]
    (out / "texts.jsonl").write_text("\n".join(rows) + "\n")
    options = ["--train-tokenizer-on", str(out / "texts.jsonl"), "--vocab-size", "300"]
    make_model.main(["--out", str(out), *SMALL, *options])
    return out


def chat_ids(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_config_and_weights_are_those_asked_for(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.model_type == "qwen3_moe"
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts) == (64, 1, 4)
    assert (config.head_dim, config.num_experts_per_tok, config.norm_topk_prob) == (32, 2, True)
    assert not config.tie_word_embeddings
    weights = load_file(checkpoint / "model.safetensors")
    assert weights["model.layers.0.mlp.experts.3.gate_proj.weight"].shape == (64, 64)
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (2 * 32, 64)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_model_runs_and_ends_a_turn_with_im_end(checkpoint, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    logits = model(torch.tensor([chat_ids(tokenizer, "37+48=")])).logits
    assert logits.shape == (1, 11, len(tokenizer))
    assert torch.isfinite(logits).all()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == model.config.eos_token_id == end
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == end


def test_the_seed_fixes_every_weight(make_model, checkpoint, tmp_path):
    def make(seed):
        make_model.main(["--out", str(tmp_path / seed), "--seed", seed, *SMALL])
        return (tmp_path / seed / "model.safetensors").read_bytes()

    assert make("3") == (checkpoint / "model.safetensors").read_bytes() != make("4")


def test_chat_template_text_is_exact(tokenizer):
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4+5="},
    ]
    turns = (
        "<|im_start|><|system|>Add.<|im_end|><|im_start|><|user|>1+2=<|im_end|>"
        "<|im_start|><|assistant|>3<|im_end|><|im_start|><|user|>4+5=<|im_end|>"
    )
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == turns
    with_start = render(messages, tokenize=False, add_generation_prompt=True)
    assert with_start == turns + "<|im_start|><|assistant|>"


def test_every_character_and_every_special_token_is_one_token(make_model, tokenizer):
    assert len(chat_ids(tokenizer, "37+48=")) == 2 + 6 + 1 + 2
    for token in (*make_model.SPECIAL_TOKENS, *make_model.CHARACTERS):
        assert len(tokenizer.encode(token)) == 1, token


def test_characters_outside_the_vocabulary_become_unk(tokenizer):
    assert tokenizer.decode(tokenizer.encode("1\u20ac")) == "1<unk>"


@given(text=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40))
def test_printable_text_survives_the_character_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("text", [*TEXTS, "unseen \u4e2d\u6587 text,  two spaces"])
def test_any_text_survives_the_trained_tokenizer(bpe_checkpoint, text):
    tokenizer = AutoTokenizer.from_pretrained(bpe_checkpoint)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_trained_tokenizer_keeps_digits_apart_and_fits_the_model(bpe_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(bpe_checkpoint)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("42")] == ["4", "2"]
    assert len(tokenizer.encode("much")) < 4  # it has learned merges
    assert AutoConfig.from_pretrained(bpe_checkpoint).vocab_size == len(tokenizer)
    start = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|user|>")]
    assert chat_ids(tokenizer, "hi")[:2] == start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "3"], "not a multiple of --kv-heads"),
        (["--experts", "1"], "more than --experts"),
        (["--head-dim", "16"], "invalid choice: 16"),
        (["--vocab-size", "99"], "is for --train-tokenizer-on"),
        (["--train-tokenizer-on", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    ],
)
def test_options_that_cannot_work_are_refused(make_model, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        make_model.main(["--out", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_not_json_is_named(make_model, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{"a"\n')
    with pytest.raises(SystemExit, match=r"bad\.jsonl: line 2 is not JSON"):
        make_model.main(
            ["--out", str(tmp_path / "out"), "--train-tokenizer-on", str(tmp_path / "bad.jsonl")]
        )
