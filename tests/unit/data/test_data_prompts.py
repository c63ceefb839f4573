import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from mcore_rl.data.prompts import DataConfig, load_prompts, load_sft_sequences
from mcore_rl.errors import UserError
from tests.sequences import lists_of

ROW = {"prompt": "1+1=", "ground_truth": "2", "data_source": "arithmetic"}


def test_a_plain_string_becomes_one_user_message(tokenizer, write_jsonl):
    (prompt,) = load_prompts(write_jsonl([ROW]), DataConfig(), tokenizer)
    assert prompt.text == "<|im_start|>u1+1=<|im_end|><|im_start|>a"
    assert prompt.token_ids.tolist() == tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "u", "1", "+", "1", "=", "<|im_end|>", "<|im_start|>", "a"]
    )
    assert (prompt.uid, prompt.data_source, prompt.ground_truth) == (
        "rows.jsonl:0",
        "arithmetic",
        "2",
    )


def test_verl_parquet_rows_load_unchanged(tokenizer, tmp_path):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "1+1"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 5},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    (prompt,) = load_prompts([str(tmp_path / "train.parquet")], DataConfig(), tokenizer)
    assert prompt.text == "<|im_start|>sHi<|im_end|><|im_start|>u1+1<|im_end|><|im_start|>a"
    assert (prompt.data_source, prompt.ground_truth) == ("openai/gsm8k", "2")
    assert prompt.extra_info == {"index": 5}


def test_column_names_come_from_the_config(tokenizer, write_jsonl):
    path = write_jsonl([{"question": "a", "ground_truth": 0, "source": "s"}])
    cfg = DataConfig(prompt_key="question", reward_fn_key="source")
    (prompt,) = load_prompts(path, cfg, tokenizer)
    assert (prompt.data_source, prompt.ground_truth) == ("s", 0)


def test_a_misspelt_template_variable_is_refused_before_a_row_is_read(tokenizer, tmp_path):
    cfg = DataConfig(apply_chat_template_kwargs={"thinc": True})
    with pytest.raises(UserError, match=r"kwargs\.thinc: .* Did you mean 'think'\?"):
        load_prompts(str(tmp_path / "missing.jsonl"), cfg, tokenizer)


def test_template_variables_reach_the_template(tokenizer, write_jsonl):
    cfg = DataConfig(apply_chat_template_kwargs={"think": True})
    (prompt,) = load_prompts(write_jsonl([ROW]), cfg, tokenizer)
    assert prompt.text.endswith("<|im_start|>a!")


MALFORMED_ROWS = {
    "no prompt": ({"prompt": None}, "column 'prompt': there is no value"),
    "NaN prompt": ({"prompt": math.nan}, "column 'prompt': there is no value"),
    "number as prompt": ({"prompt": 5}, "column 'prompt': .*int where a string"),
    "object as prompt": ({"prompt": {"role": "user"}}, "column 'prompt': .*dict where a string"),
    "blank prompt": ({"prompt": " \n"}, "column 'prompt': the text is empty"),
    "lone surrogate": ({"prompt": "\ud800"}, "column 'prompt': .*not valid UTF-8"),
    "no messages": ({"prompt": []}, "column 'prompt': the list of messages is empty"),
    "message without role": ({"prompt": [{"content": "a"}]}, "column 'prompt': .*Message 0"),
    "message that is text": ({"prompt": ["a"]}, "column 'prompt': message 0 is no object"),
    "content of parts": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "column 'prompt': .*list where a string",
    ),
    "refused by the template": (
        {"prompt": [{"role": "robot", "content": "a"}]},
        "column 'prompt': the chat template refuses .*no robots",
    ),
    "messages in a list": (
        {"prompt": [[{"role": "user"}]]},
        "column 'prompt': message 0 is no obj",
    ),
    "role is null": ({"prompt": [{"role": None, "content": "a"}]}, "column 'prompt': .*Message 0"),
    "content is null": (
        {"prompt": [{"role": "system", "content": None}, {"role": "user", "content": "a"}]},
        "column 'prompt': .*NoneType where a string.*Message 0",
    ),
    "a user who says nothing": (
        {"prompt": [{"role": "user", "content": " "}]},
        "column 'prompt': the text is empty.*Message 0",
    ),
    "the answer in the prompt": (
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "2"}]},
        "column 'prompt': ends with a turn of the assistant.*data.continue_final_message=true",
    ),
    "what the template cannot use": (
        {"prompt": [{"role": "user", "content": "a", "name": 3}]},
        "column 'prompt': the chat template refuses .*int",
    ),
    "infinite ground truth": ({"ground_truth": math.inf}, "column 'ground_truth': inf is no num"),
    "no ground truth": ({"ground_truth": None}, "column 'ground_truth': there is no value"),
    "NaN ground truth": ({"ground_truth": math.nan}, "column 'ground_truth': there is no value"),
    "reward_model is text": (
        {"ground_truth": None, "reward_model": "rule"},
        "column 'reward_model': .*str where an object",
    ),
    "no data source": ({"data_source": None}, "column 'data_source': there is no value.*gsm8k"),
    "data source is a number": ({"data_source": 3}, "column 'data_source': .*int where a string"),
    "extra_info is a list": ({"extra_info": [1]}, "column 'extra_info': .*list where an object"),
    "too long": (
        {"prompt": "1" * 60},
        "column 'prompt': 65 tokens, more than data.max_prompt_length=20.*data.truncation=left",
    ),
}


@pytest.mark.parametrize("name", MALFORMED_ROWS)
def test_a_malformed_row_is_one_line_that_names_it(tokenizer, write_jsonl, name):
    changes, problem = MALFORMED_ROWS[name]
    path = write_jsonl([ROW, {**ROW, **changes}])
    with pytest.raises(UserError, match=rf"rows\.jsonl row 1, {problem}") as caught:
        load_prompts(path, DataConfig(max_prompt_length=20), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_ends_with_the_assistant_is_continued_when_asked(tokenizer, write_jsonl):
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "2+"}]
    cfg = DataConfig(continue_final_message=True)
    path = write_jsonl([{**ROW, "prompt": begun}, ROW])
    continued, usual = load_prompts(path, cfg, tokenizer)
    assert continued.text == "<|im_start|>ua<|im_end|><|im_start|>a2+"
    assert usual.text == "<|im_start|>u1+1=<|im_end|><|im_start|>a"


def test_nulls_that_parquet_puts_into_calls_of_tools_are_gone(tokenizer, tmp_path, monkeypatch):
    """Calls of different tools have the arguments of all of them in one struct; a null content
    stays what it is."""
    template = "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("f", "g")]
    prompt = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "", "name": "f"},
    ]
    pq.write_table(pa.Table.from_pylist([{**ROW, "prompt": prompt}]), tmp_path / "a.parquet")
    (loaded,) = load_prompts(str(tmp_path / "a.parquet"), DataConfig(), tokenizer)
    found = [json.loads(text) for text in loaded.text.split("<|im_end|>")[:-1]]
    assert found == prompt


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("answer", {"answer": "7"}),
        ("extra_info.answer", {"extra_info": {"answer": "7"}}),
        ("a.b", {"a.b": "7"}),
        ("reward_model.ground_truth", {"reward_model": {"ground_truth": "7"}}),
    ],
)
def test_the_ground_truth_is_read_where_the_key_says(tokenizer, write_jsonl, key, row):
    path = write_jsonl([{**ROW, **row}])
    (prompt,) = load_prompts(path, DataConfig(ground_truth_key=key), tokenizer)
    assert prompt.ground_truth == "7"
    with pytest.raises(UserError, match=f"row 0, column '{key}': there is no value"):
        load_prompts(write_jsonl([ROW]), DataConfig(ground_truth_key=key), tokenizer)


def test_at_most_so_many_rows_are_read(tokenizer, write_jsonl):
    path = write_jsonl([{**ROW, "prompt": f"{i}"} for i in range(40)])
    uids = lambda cfg, most: [p.uid for p in load_prompts(path, cfg, tokenizer, most)]  # noqa: E731
    first, every = DataConfig(shuffle=False), DataConfig()
    assert uids(first, 3) == ["rows.jsonl:0", "rows.jsonl:1", "rows.jsonl:2"]
    drawn = uids(every, 10)
    assert len(set(drawn)) == 10
    assert drawn == uids(every, 10) != uids(DataConfig(seed=1), 10)
    assert drawn == sorted(drawn, key=lambda uid: int(uid.split(":")[1]))
    assert max(int(uid.split(":")[1]) for uid in drawn) > 10
    assert len(uids(every, 50)) == len(uids(every, -1)) == 40


def test_sft_reads_conversations_in_rows_without_a_response(tokenizer, write_jsonl):
    """Beside a prompt, as in published data sets; rows with a response have that."""
    turns = [
        {"role": role, "content": text}
        for role, text in (("system", ""), ("user", "1"), ("assistant", "2"), ("user", "3"))
    ]
    talk = [*turns, {"role": "assistant", "content": "4"}]
    rows = [
        {"messages": talk},
        {"prompt": "1", "messages": talk},
        {"prompt": "1", "messages": talk, "response": "5"},
        {"talk": talk},
    ]
    first, second, third = load_sft_sequences(write_jsonl(rows[:3]), DataConfig(), tokenizer)
    own = tokenizer.apply_chat_template(talk, return_dict=False)
    assert lists_of(first) == lists_of(second)
    assert list(first.token_ids) == own
    trained = [t for t, m in zip(first.token_ids, first.loss_mask, strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(trained) == ["2", "<|im_end|>", "4", "<|im_end|>"]
    assert tokenizer.decode(third.token_ids).endswith("<|im_start|>a5<|im_end|>")
    (named,) = load_sft_sequences(write_jsonl(rows[3:]), DataConfig(messages_key="talk"), tokenizer)
    assert lists_of(named) == lists_of(first)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "user", "content": "1"}], "the assistant says nothing that could train"),
        (
            [{"role": "user", "content": "1" * 30}, {"role": "assistant", "content": "2"}],
            "37 tokens, more than data.max_prompt_length",
        ),
        ([{"role": "robot", "content": "1"}], "the chat template refuses"),
        ("[]", "there is no value"),
    ],
)
def test_a_conversation_that_cannot_train_names_its_row(tokenizer, write_jsonl, messages, problem):
    row = {"messages": messages} if isinstance(messages, list) else {}
    cfg = DataConfig(max_prompt_length=10, max_response_length=10)
    with pytest.raises(UserError, match=rf"rows\.jsonl row 0, .*{problem}"):
        load_sft_sequences(write_jsonl([row or {"other": 1}]), cfg, tokenizer)


@pytest.mark.parametrize(
    ("truncation", "text"), [("right", "u1<|im_end|>"), ("left", "99<|im_end|>")]
)
def test_a_long_conversation_is_cut_with_its_mask_or_dropped(
    tokenizer, write_jsonl, truncation, text
):
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2" * 9 + "99"}]
    short = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    path = write_jsonl([{"messages": talk}, {"messages": short}])
    limits: dict[str, Any] = {"max_prompt_length": 4, "max_response_length": 4}
    cfg = DataConfig(**limits, truncation=truncation)
    long, whole = load_sft_sequences(path, cfg, tokenizer)
    assert len(long.token_ids) == len(long.loss_mask) == 8
    assert text in tokenizer.decode(long.token_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(long.token_ids))
    assert [t for t, m in zip(tokens, long.loss_mask, strict=True) if not m] == (
        ["<|im_start|>", "u", "1", "<|im_end|>", "<|im_start|>", "a"]
        if truncation == "right"
        else []
    )
    (kept,) = load_sft_sequences(
        path, DataConfig(**limits, filter_overlong_prompts=True), tokenizer
    )
    assert lists_of(kept) == lists_of(whole)


def test_of_a_conversation_cut_to_two_tokens_the_second_trains(tokenizer, write_jsonl):
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "29"}]
    cfg = DataConfig(max_prompt_length=1, max_response_length=1, truncation="left")
    (cut,) = load_sft_sequences(write_jsonl([{"messages": talk}]), cfg, tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(cut.token_ids)) == ["9", "<|im_end|>"]
    assert cut.loss_mask.tolist()[1:] == [True]


@pytest.mark.parametrize(
    ("truncation", "kept"), [("left", "56789"), ("right", "01234"), ("middle", "01789")]
)
def test_truncation_keeps_the_named_part(plain_tokenizer, write_jsonl, truncation, kept):
    path = write_jsonl([{**ROW, "prompt": "0123456789"}, ROW])
    cfg = DataConfig(max_prompt_length=5, truncation=truncation)
    long, short = load_prompts(path, cfg, plain_tokenizer)
    assert long.text == kept
    assert plain_tokenizer.decode(long.token_ids) == kept
    assert short.text == "1+1="


@pytest.mark.parametrize("truncation", ["left", "right", "middle"])
@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_truncation_leaves_exactly_the_limit(plain_tokenizer, write_jsonl, truncation, limit):
    path = write_jsonl([{**ROW, "prompt": "0123456789"}])
    cfg = DataConfig(max_prompt_length=limit, truncation=truncation)
    assert len(load_prompts(path, cfg, plain_tokenizer)[0].token_ids) == limit


def test_overlong_prompts_are_dropped_when_asked_and_the_rest_keep_their_names(
    plain_tokenizer, write_jsonl
):
    path = write_jsonl([{**ROW, "prompt": "x" * n} for n in (5, 6, 4)])
    cfg = DataConfig(max_prompt_length=5, filter_overlong_prompts=True)
    prompts = load_prompts(path, cfg, plain_tokenizer)
    assert [prompt.uid for prompt in prompts] == ["rows.jsonl:0", "rows.jsonl:2"]


def test_dropping_every_prompt_is_refused(plain_tokenizer, write_jsonl):
    cfg = DataConfig(max_prompt_length=2, filter_overlong_prompts=True)
    with pytest.raises(UserError, match=r"data\.max_prompt_length=2 .*all are dropped"):
        load_prompts(write_jsonl([ROW]), cfg, plain_tokenizer)


def test_sft_trains_the_response_and_the_end_of_its_turn(tokenizer, write_jsonl):
    path = write_jsonl([{"prompt": "1+1=", "response": "2"}])
    (sequence,) = load_sft_sequences(path, DataConfig(), tokenizer)
    text = "<|im_start|>u1+1=<|im_end|><|im_start|>a2<|im_end|>"
    assert tokenizer.decode(sequence.token_ids) == text
    trained = [t for t, m in zip(sequence.token_ids, sequence.loss_mask, strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(trained) == ["2", "<|im_end|>"]
    assert sequence.loss_mask[-2:].tolist() == [True, True]


@pytest.mark.parametrize(
    ("response", "problem"),
    [(None, "there is no value"), ("", "the text is empty"), ("12345", "6 tokens, more than")],
)
def test_a_malformed_sft_response_names_its_row(tokenizer, write_jsonl, response, problem):
    path = write_jsonl([{"prompt": "a", "response": response}])
    with pytest.raises(UserError, match=rf"rows\.jsonl row 0, column 'response': {problem}"):
        load_sft_sequences(path, DataConfig(max_response_length=5), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batch_size": 0}, r"data\.train_batch_size=0 must be > 0"),
        ({"val_batch_size": 0}, r"data\.val_batch_size=0 must be > 0"),
        ({"max_prompt_length": -1}, r"data\.max_prompt_length=-1 must be > 0"),
        (
            {"apply_chat_template_kwargs": {"tokenize": True}},
            r"data\.apply_chat_template_kwargs\.tokenize=True is no variable",
        ),
        (
            {"apply_chat_template_kwargs": {"continue_final_message": True}},
            r"continue_final_message=True is no variable .* Set data\.continue_final_message",
        ),
        ({"train_max_samples": 0}, r"data\.train_max_samples=0 must be -1 or at least 1"),
        ({"val_max_samples": -2}, r"data\.val_max_samples=-2 must be -1 or at least 1"),
        ({"truncation": "lft"}, r"data\.truncation='lft' .*Did you mean 'left'"),
        ({"train_files": ""}, r"data\.train_files='' must be a path"),
        ({"train_files": ["a", ""]}, r"data\.train_files=\['a', ''\] must be a path"),
        ({"train_files": []}, r"data\.train_files=\[\] must be a path"),
        ({"val_files": 3}, r"data\.val_files=3 must be a path"),
    ],
)
def test_a_wrong_setting_names_its_key(change, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**change)


def test_the_config_is_a_hydra_structured_config():
    node = OmegaConf.merge(
        OmegaConf.structured(DataConfig),
        OmegaConf.from_dotlist(["train_files=[a.parquet,b.parquet]", "seed=3"]),
    )
    cfg = OmegaConf.to_object(node)
    assert isinstance(cfg, DataConfig)
    assert (cfg.train_files, cfg.seed) == (["a.parquet", "b.parquet"], 3)
