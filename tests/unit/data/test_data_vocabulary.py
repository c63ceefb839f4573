"""A tokenizer with tokens that the model has no row for is refused."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mcore_rl.data.chat import load_tokenizer
from mcore_rl.data.vocabulary import check_tokenizer
from mcore_rl.errors import UserError


def test_ids_at_or_above_vocab_size_are_refused_by_name(tmp_path):
    check_tokenizer(tmp_path, 0)  # no tokenizer
    vocabulary = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # 3
    tokenizer.save_pretrained(tmp_path)
    check_tokenizer(tmp_path, 4)
    with pytest.raises(UserError, match=r"vocab_size=3 leaves out 1 tokens .*'<pad>' \(3\)"):
        check_tokenizer(tmp_path, 3)
    with pytest.raises(UserError, match=r"vocab_size=2 leaves out 2 tokens .*'c' \(2\)"):
        check_tokenizer(tmp_path, 2)


def test_a_tokenizer_that_cannot_be_loaded_stops_no_conversion(tmp_path):
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path))
    check_tokenizer(tmp_path, 0)
