import copy
import json
import logging

import pytest
from transformers import GenerationConfig

from mcore_rl.data.chat import (
    decode_response,
    encode_prompt,
    encode_response,
    end_of_turn_id,
    end_token_ids,
    load_tokenizer,
)
from mcore_rl.errors import UserError

USER = {"role": "user", "content": "1+1="}


def test_a_prompt_equals_what_the_tokenizer_itself_makes(tokenizer):
    messages = [USER, {"role": "assistant", "content": "2"}, USER]
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, messages) == own


def test_without_a_template_contents_are_joined_and_one_warning_is_given(plain_tokenizer, caplog):
    plain_tokenizer.name_or_path = "warned-once"
    with caplog.at_level(logging.WARNING):
        ids = [encode_prompt(plain_tokenizer, [USER, USER]) for _ in range(2)]
    assert plain_tokenizer.decode(ids[0]) == "1+1=\n1+1="
    assert caplog.text.count("no chat template") == 1


def test_variables_without_a_template_are_refused(plain_tokenizer):
    with pytest.raises(UserError, match=r"data\.apply_chat_template_kwargs=.* has no effect"):
        encode_prompt(plain_tokenizer, [USER], {"enable_thinking": False})


def test_a_response_ends_with_the_templates_end_of_turn(tokenizer):
    ids = encode_response(tokenizer, "42")
    assert tokenizer.convert_ids_to_tokens(ids) == ["4", "2", "<|im_end|>"]
    assert decode_response(tokenizer, ids) == "42"


def test_a_response_without_a_template_ends_with_eos(plain_tokenizer):
    assert encode_response(plain_tokenizer, "4")[-1] == plain_tokenizer.eos_token_id


def test_a_template_that_writes_no_end_of_turn_falls_back_to_eos(tokenizer, monkeypatch):
    bare = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", bare)
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


def test_a_tokenizer_without_any_end_token_is_refused(plain_tokenizer):
    endless = copy.deepcopy(plain_tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="without an end token"):
        end_of_turn_id(endless)


def test_end_tokens_come_from_template_tokenizer_and_generation_config(tokenizer):
    eos, im_end = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    assert end_token_ids(tokenizer) == sorted([eos, im_end])
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=0)) == sorted([0, eos, im_end])
    several = GenerationConfig(eos_token_id=[im_end, 1])
    assert end_token_ids(tokenizer, several) == sorted([1, eos, im_end])


def test_a_saved_tokenizer_loads_and_encodes_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert encode_prompt(loaded, [USER]) == encode_prompt(tokenizer, [USER])


def test_code_that_a_tokenizer_brings_is_not_run(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    called, file = tmp_path / "called", tmp_path / "tokenizer_config.json"
    (tmp_path / "mine.py").write_text(f"import os\nos.mkdir({str(called)!r})\nclass Mine: pass\n")
    auto_map = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | auto_map))
    loaded = load_tokenizer(str(tmp_path))
    assert encode_prompt(loaded, [USER]) == encode_prompt(tokenizer, [USER])
    assert not called.exists()


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (None, "is not a folder"),
        ({"config.json": '{"model_type": "qwen3"}'}, "holds no tokenizer .* Copy the tokenizer's"),
        (
            {"tiktoken.model": "YQ== 0"},
            "holds no tokenizer .* Convert its tokenizer to tokenizer.j",
        ),
        ({"qwen.tiktoken": "YQ== 0"}, "holds no tokenizer .* Convert its tokenizer to tokenizer.j"),
        ({"tokenizer.json": "{cut"}, "cannot be loaded"),
        ({"tokenizer.json": "{}"}, "cannot be loaded"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[" * 10**5}, "cannot be loaded"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, files, problem):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=problem):
        load_tokenizer(str(folder))
