"""Messages to token ids and back.

The chat template of the tokenizer decides what a conversation looks like; a tokenizer without one
gets the contents as plain text. Prompts end where the assistant begins to speak; responses end with
the token that ends its turn, which is also among the tokens that stop the rollout engine.

Tokenizers are read from a local folder only; nothing is downloaded here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_rl.errors import UserError, require
from mcore_rl.model_files import TIKTOKEN_FILES, VOCABULARY_FILES, has_tokenizer, holds_any

if TYPE_CHECKING:
    # At run time transformers is imported where a tokenizer is loaded: it takes seconds, and the
    # command line reads the `data` section from this package before it needs one.
    from transformers import GenerationConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
"""{"role": "user", "content": "What is 2 + 3?"}"""


_VERBOSE = False
"""Of transformers, which would warn of long texts; their length is judged by the `data` section."""


class ChatTemplateError(UserError):
    """The chat template refuses the messages."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved in the folder `path`.

    Raises:
        UserError: if the folder is missing, holds no vocabulary, or holds a damaged one.
    """
    folder = Path(path).expanduser()
    require(folder.is_dir(), "model.path", path, "is not a folder", "Download the model first.")
    # Without this check transformers makes a tokenizer of one token from config.json alone.
    require(
        has_tokenizer(folder),
        "model.path",
        path,
        f"holds no tokenizer (none of {', '.join(VOCABULARY_FILES)})",
        "Convert its tokenizer to tokenizer.json; code beside the weights is not run."
        if holds_any(folder, TIKTOKEN_FILES)
        else "Copy the tokenizer's files beside the weights.",
    )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.path={path!r}: the tokenizer cannot be loaded ({reason})."
        ) from None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a conversation up to where the assistant's next turn begins.

    Args:
        tokenizer: its chat template is applied with `add_generation_prompt`; without a template
            the contents, joined by newlines, are encoded as plain text.
        messages: the conversation, oldest first.
        template_kwargs: variables of the chat template, such as {"enable_thinking": False}.

    Raises:
        ChatTemplateError: if the template refuses the messages.
        UserError: if there are variables and no template to take them.
    """
    template_kwargs = template_kwargs or {}
    if tokenizer.chat_template is None:
        require(
            not template_kwargs,
            "data.apply_chat_template_kwargs",
            dict(template_kwargs),
            "has no effect: the tokenizer has no chat template",
            "Leave it out.",
        )
        _warn_no_template(str(tokenizer.name_or_path))
        text = "\n".join(message["content"] for message in messages)
        return tokenizer.encode(text, verbose=_VERBOSE)
    text = _render(tokenizer, messages, add_generation_prompt=True, **template_kwargs)
    return tokenizer.encode(text, add_special_tokens=False, verbose=_VERBOSE)


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of an assistant's turn, its end token included."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=_VERBOSE)
    return [*ids, end_of_turn_id(tokenizer)]


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of a response without special tokens: what rewards read."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends an assistant's turn.

    It is the special token that the chat template writes after the assistant's words
    ("<|im_end|>"), which need not be the tokenizer's EOS ("<|endoftext|>"). Where the template
    writes none, or there is no template, it is EOS.

    Raises:
        UserError: if there is neither.
    """
    if tokenizer.chat_template is not None:
        words = "assistant-words"
        conversation = [
            {"role": "user", "content": "user-words"},
            {"role": "assistant", "content": words},
        ]
        tail = _render(tokenizer, conversation).rpartition(words)[2].lstrip()
        ids = tokenizer.encode(tail, add_special_tokens=False)
        if ids and ids[0] in _special_ids(tokenizer):
            return ids[0]
    require(
        tokenizer.eos_token_id is not None,
        "model.path",
        str(tokenizer.name_or_path),
        "has a tokenizer without an end token",
        "Set eos_token in its tokenizer_config.json.",
    )
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> list[int]:
    """Return, sorted, every token that ends a response.

    These are the end of turn of the chat template, the tokenizer's EOS, and the EOS tokens of the
    model's generation config.
    """
    ids = {end_of_turn_id(tokenizer)}
    for source in (tokenizer, generation_config):
        eos: int | list[int] | None = getattr(source, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return sorted(ids)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **variables) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, **variables
        )
    # A template is a program: what it expects of a message shows in whatever its lines raise.
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ChatTemplateError(f"the chat template refuses the messages ({reason})") from None
    assert isinstance(text, str)
    return text


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


@functools.cache
def _warn_no_template(name: str) -> None:
    logger.warning("%s has no chat template: prompts are encoded as plain text", name)
