import copy
import itertools
import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mcore_rl.data.chat import (
    ChatTemplateError,
    check_template_variables,
    decode_response,
    encode_conversation,
    encode_prompt,
    encode_response,
    end_of_turn_id,
    end_token_ids,
    load_tokenizer,
    token_texts,
)
from mcore_rl.errors import UserError

USER = {"role": "user", "content": "1+1="}
ASSISTANT = {"role": "assistant", "content": "2"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
TOOL = {"role": "tool", "content": "2"}
WITH_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}"
    "{% if m.content is not none %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}({{ call.function.name }}{{ call.function.arguments | tojson }})"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)
# As Qwen3's: what the assistant thought before the last user's turn is left out.
FORGETFUL = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}[]{% endif %}{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)


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


def byte_tokenizer():
    """A tokenizer of one token per byte, as byte-level BPE without merges is."""
    vocabulary = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def test_the_texts_of_tokens_are_those_of_the_characters_that_they_end():
    tokenizer = byte_tokenizer()
    text = "a é 日🙂<|end|>"
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    # é has 2 bytes, 日 3 and the face 4; each belongs to its last.
    faces = ["", "", "日", "", "", "", "🙂"]
    assert texts == ["a", " ", "", "é", " ", *faces, "<|end|>"]


def test_bytes_that_are_no_character_take_nothing_from_what_follows():
    tokenizer = byte_tokenizer()
    half = tokenizer.encode("日")[:2]
    for ids in ([*half, *tokenizer.encode("ab")], half, tokenizer.encode("ab") + half):
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)


def test_a_space_that_begins_a_word_is_part_of_its_token():
    """A tokenizer of SentencePiece leaves it out where the word begins the text."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "\u2581the", "\u2581cat", "s"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert token_texts(tokenizer, [1, 2, 3, 1]) == ["the", " cat", "s", " the"]
    assert token_texts(tokenizer, []) == []


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


QWEN3_LIKE = (
    "{%- for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% if message.role == 'tool' %}{% continue %}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think></think>{%- endif %}"
)


def test_a_variable_that_the_template_does_not_read_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", QWEN3_LIKE)
    check_template_variables(tokenizer, ["enable_thinking"])
    for name, hint in {
        "enable_thinkin": " Did you mean 'enable_thinking'?",
        "content": "",  # a word of the template, and no variable
    }.items():
        with pytest.raises(UserError) as caught:
            check_template_variables(tokenizer, [name])
        assert str(caught.value) == (
            f"data.apply_chat_template_kwargs.{name}: the model's chat template reads no such "
            f"variable.{hint}"
        )


def test_a_turn_of_the_assistant_that_ends_a_prompt_is_continued(tokenizer, plain_tokenizer):
    ids = encode_prompt(tokenizer, [USER, ASSISTANT])
    assert tokenizer.decode(ids) == "<|im_start|>u1+1=<|im_end|><|im_start|>a2"
    assert plain_tokenizer.decode(encode_prompt(plain_tokenizer, [USER, ASSISTANT])) == "1+1=\n2"


def test_an_end_token_that_the_tokenizer_appends_is_not_part_of_a_prompt(plain_tokenizer):
    """Nor of a prompt that has the token's text at its end already is one taken."""
    adding = copy.deepcopy(plain_tokenizer)
    ids = [(name, adding.convert_tokens_to_ids(name)) for name in ("<unk>", "<eos>")]
    adding._tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=ids
    )
    assert adding.convert_ids_to_tokens(adding.encode("1+1"))[-1] == "<eos>"
    tokens = adding.convert_ids_to_tokens(encode_prompt(adding, [USER]))
    assert tokens == ["<unk>", "1", "+", "1", "="]
    ended = encode_prompt(adding, [{"role": "user", "content": "1<eos>"}])
    assert adding.convert_ids_to_tokens(ended) == ["<unk>", "1", "<eos>"]


def test_tool_turns_are_written_as_the_template_writes_them(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    ids = encode_prompt(tokenizer, [{"role": "system", "content": ""}, USER, CALL, TOOL])
    assert tokenizer.decode(ids) == (
        '<|im_start|>s<|im_end|><|im_start|>u1+1=<|im_end|><|im_start|>a(add{"a": 1})<|im_end|>'
        "<|im_start|>t2<|im_end|><|im_start|>a"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "writes 'None' as content of message 1"),
        ("", "leaves out the tool_calls of message 1"),
    ],
)
def test_a_template_that_does_not_know_tools_refuses_their_calls(tokenizer, content, problem):
    """It would lose them without a word."""
    with pytest.raises(ChatTemplateError, match=problem):
        encode_prompt(tokenizer, [USER, {**CALL, "content": content}, TOOL])
    with pytest.raises(ChatTemplateError, match=problem):
        encode_conversation(tokenizer, [USER, {**CALL, "content": content}, TOOL, ASSISTANT])


@pytest.mark.parametrize(
    ("template", "messages", "pieces"),
    [
        (
            None,
            [USER, ASSISTANT],
            ["<|im_start|>u1+1=<|im_end|><|im_start|>a", "2<|im_end|>"],
        ),
        (
            None,
            [USER, ASSISTANT, USER, ASSISTANT],
            ["<|im_start|>u1+1=<|im_end|><|im_start|>a", "2<|im_end|>"] * 2,
        ),
        (
            WITH_TOOLS,
            [USER, CALL, TOOL, ASSISTANT, USER],
            [
                "<|im_start|>u1+1=<|im_end|><|im_start|>a",
                '(add{"a": 1})<|im_end|>',
                "<|im_start|>t2<|im_end|><|im_start|>a",
                "2<|im_end|>",  # and nothing of what follows, which could train nothing
            ],
        ),
        (
            FORGETFUL,
            [USER, ASSISTANT, USER, ASSISTANT],
            [
                "<|im_start|>u1+1=<|im_end|><|im_start|>a",
                "2<|im_end|>",
                "<|im_start|>u1+1=<|im_end|><|im_start|>a",
                "[]2<|im_end|>",
            ],
        ),
    ],
)
def test_every_turn_of_the_assistant_in_a_conversation_trains(
    tokenizer, monkeypatch, template, messages, pieces
):
    """What it says and the end of its turn, and nothing that the template or others write."""
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    ids, mask = encode_conversation(tokenizer, messages)
    assert tokenizer.decode(ids) == "".join(pieces)
    found = [
        (trains, tokenizer.decode([token for _, token in part]))
        for trains, part in itertools.groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0])
    ]
    assert found == [(number % 2 == 1, piece) for number, piece in enumerate(pieces)]


def test_a_conversation_whose_template_writes_no_end_of_turn_ends_with_eos(tokenizer, monkeypatch):
    bare = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", bare)
    ids, mask = encode_conversation(tokenizer, [USER, ASSISTANT])
    assert tokenizer.convert_ids_to_tokens(ids) == [*"1+1=\n2\n", "<eos>"]
    assert mask == [False] * 5 + [True] * 3
    with pytest.raises(ChatTemplateError, match="does not mark the end of message 1"):
        encode_conversation(tokenizer, [USER, ASSISTANT, USER, ASSISTANT])


def test_a_conversation_that_a_template_rewrites_is_refused(tokenizer, monkeypatch):
    """The prompt of the first turn counts the messages, so it is not what stands in the whole."""
    counting = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", counting)
    with pytest.raises(ChatTemplateError, match="writes otherwise what stands before message 1"):
        encode_conversation(tokenizer, [USER, ASSISTANT])


def test_a_conversation_without_a_template_is_refused(plain_tokenizer):
    with pytest.raises(UserError, match=r"data\.messages_key='messages' needs a chat template"):
        encode_conversation(plain_tokenizer, [USER, ASSISTANT])
