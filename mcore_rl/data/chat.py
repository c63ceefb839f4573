"""Messages to token ids and back.

The chat template of the tokenizer decides what a conversation looks like; a tokenizer without one
gets the contents as plain text. Prompts end where the assistant begins to speak, or within a turn
of its that is to be continued; responses end with the token that ends its turn, which is also among
the tokens that stop the rollout engine.

Tokenizers are read from a local folder only; nothing is downloaded here.
"""

# The types of a tokenizer's methods are incomplete in transformers.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mcore_rl.errors import UserError, closest_hint, require
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

_MOST_TOKENS_OF_A_CHARACTER = 4
"""A character has at most 4 bytes in UTF-8."""


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
        tokenizer = cast(
            "PreTrainedTokenizerBase",
            AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            ),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.path={path!r}: the tokenizer cannot be loaded ({reason})."
        ) from None
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a conversation up to where the assistant's next turn begins; of one
    that ends with a turn of the assistant, up to the end of what it says there.

    Args:
        tokenizer: its chat template is applied; without a template the contents, joined by
            newlines, are encoded as plain text, with no end token.
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
        _warn_no_template(_name_of(tokenizer))
        return _encode_open_end(tokenizer, "\n".join(m["content"] or "" for m in messages))
    continues = ends_with_assistant(messages)
    _check_tool_turns(tokenizer, messages, **template_kwargs)
    text = _render(
        tokenizer,
        messages,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        **template_kwargs,
    )
    return tokenizer.encode(text, add_special_tokens=False, verbose=_VERBOSE)


def _name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(cast("object", tokenizer.name_or_path))


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Return the text of the tokens, special ones too."""
    return str(tokenizer.decode(token_ids))


def check_template_variables(tokenizer: PreTrainedTokenizerBase, variables: Iterable[str]) -> None:
    """Raise a UserError for a variable that the chat template, if there is one, does not read."""
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables

    if tokenizer.chat_template is None:
        return
    # A tag that transformers adds to Jinja's.
    text = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", str(tokenizer.get_chat_template()))
    try:
        syntax = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError:
        return  # said with the first prompt
    read = sorted(find_undeclared_variables(syntax))
    for name in variables:
        if name not in read:
            raise UserError(
                f"data.apply_chat_template_kwargs.{name}: the model's chat template reads no such "
                f"variable.{closest_hint(name, read)}"
            )


def ends_with_assistant(messages: Sequence[Message]) -> bool:
    return messages[-1]["role"] == "assistant"


def _encode_open_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids with the special tokens that the tokenizer puts before a text, and none of
    those that it puts after it: the response goes on from here."""
    ids = tokenizer.encode(text, verbose=_VERBOSE)
    bare = tokenizer.encode(text, add_special_tokens=False, verbose=_VERBOSE)
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    return ids


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation up to the end of the assistant's last turn, and a mask
    that is True on what the assistant says in each of its turns and on the tokens that end them.

    What it says is tokenized apart from the rest, as when it generates it.

    Raises:
        ChatTemplateError: if the template refuses the messages, or if it is not clear what of the
            text is the assistant's.
        UserError: if there is no template.
    """
    template_kwargs = template_kwargs or {}
    require(
        tokenizer.chat_template is not None,
        "data.messages_key",
        "messages",
        "needs a chat template, which the tokenizer has not",
        "Give rows a prompt and a response.",
    )
    end_id = end_of_turn_id(tokenizer)
    end = decode(tokenizer, [end_id])
    _check_tool_turns(tokenizer, messages, **template_kwargs)
    text = _render(tokenizer, messages, **template_kwargs)
    ids: list[int] = []
    mask: list[bool] = []
    done = 0

    def add(until: int, trains: bool) -> None:
        nonlocal done
        piece = tokenizer.encode(text[done:until], add_special_tokens=False, verbose=_VERBOSE)
        ids.extend(piece)
        mask.extend([trains] * len(piece))
        done = until

    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(
            tokenizer, messages[:number], add_generation_prompt=True, **template_kwargs
        )
        if not text.startswith(before) or len(before) < done:
            raise ChatTemplateError(
                f"the chat template writes otherwise what stands before message {number} when it "
                "is the assistant's turn and when that has been taken"
            )
        add(len(before), trains=False)
        stop = text.find(end, done)
        if stop >= 0:
            add(stop + len(end), trains=True)
        elif number == len(messages) - 1:  # the template leaves the end to EOS
            add(len(text), trains=True)
            ids.append(end_id)
            mask.append(True)
        else:
            raise ChatTemplateError(f"the chat template does not mark the end of message {number}")
    return ids, mask


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of an assistant's turn, its end token included."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=_VERBOSE)
    return [*ids, end_of_turn_id(tokenizer)]


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Return the text of a response without special tokens: what rewards read."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> list[str]:
    """Return the text that each token adds to those before it, special tokens too.

    Where several tokens make one character, it belongs to the last of them and the others have "".
    """
    texts: list[str] = []
    before: list[int] = []  # a tokenizer may write a space before a word that does not begin a text
    pending: list[int] = []
    for token_id in map(int, token_ids):
        pending.append(token_id)
        text = _added_text(tokenizer, before, pending)
        is_part = text.endswith("\ufffd") and len(pending) < _MOST_TOKENS_OF_A_CHARACTER
        texts.append("" if is_part else text)
        if not is_part:
            before, pending = pending, []
    if pending:
        texts[-1] = _added_text(tokenizer, before, pending)
    return texts


def _added_text(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]
) -> str:
    def text_of(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    return text_of([*before, *ids])[len(text_of(before)) :]


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
        _name_of(tokenizer),
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


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **variables: Any
) -> str:
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


def _check_tool_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **variables: Any
) -> None:
    """Raise a ChatTemplateError if the template leaves calls of tools out, or writes "None" where
    such a turn has no content."""
    for number, message in enumerate(messages):
        if not message.get("tool_calls"):
            continue
        upto = [*messages[:number], message]
        text = _render(tokenizer, upto, **variables)
        as_text = {**message, "content": message["content"] or ""}
        if text.count("None") > _render(
            tokenizer, [*messages[:number], as_text], **variables
        ).count("None"):
            raise ChatTemplateError(
                f"the chat template writes 'None' as content of message {number}"
            )
        del as_text["tool_calls"]
        if text == _render(tokenizer, [*messages[:number], as_text], **variables):
            raise ChatTemplateError(
                f"the chat template leaves out the tool_calls of message {number}"
            )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


@functools.cache
def _warn_no_template(name: str) -> None:
    logger.warning("%s has no chat template: prompts are encoded as plain text", name)
