"""Rows to prompts, and the order in which the loop sees them.

Invariants:
- A row either becomes a prompt (or a sequence of supervised fine-tuning) or stops the run with one
  line that names file, row, column and the way out; only `data.filter_overlong_prompts` drops rows.
- The order of prompts is a function of (seed, epoch) alone, so two integers resume it exactly.

Columns read: the ones that `data.prompt_key`, `data.reward_fn_key` and `data.ground_truth_key` name
and `extra_info`; for supervised fine-tuning a prompt and `data.response_key`, or, in a row without
a response, the conversation in `data.messages_key`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np

from mcore_rl.data.chat import (
    ChatTemplateError,
    Message,
    check_template_variables,
    decode,
    encode_conversation,
    encode_prompt,
    encode_response,
    ends_with_assistant,
)
from mcore_rl.data.rows import Row, read_rows
from mcore_rl.errors import require, require_one_of
from mcore_rl.types import Prompt, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")


def _cut_middle(token_ids: list[Any], length: int) -> list[Any]:
    head = length // 2
    return token_ids[:head] + token_ids[len(token_ids) - (length - head) :]


_TRUNCATIONS: dict[str, Callable[[list[Any], int], list[Any]]] = {
    "left": lambda token_ids, length: token_ids[-length:],
    "right": lambda token_ids, length: token_ids[:length],
    "middle": _cut_middle,
}


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The `data` section: where prompts come from and how long they may be."""

    train_files: Any = None
    """A file, folder or data set of the Hugging Face hub (see `sources.py`), or a list of them, of
    any forms: Parquet, JSON array, JSON lines."""
    val_files: Any = None
    """The same for validation; None for none."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string, or a list of {"role", "content"} messages."""
    reward_fn_key: str = "data_source"
    """Column whose value selects the reward."""
    ground_truth_key: str = "ground_truth"
    """Column with the reference answer, or a path below an object: extra_info.answer. Where the
    default one has no value, reward_model.ground_truth has it."""
    response_key: str = "response"
    """Fine-tuning: column with the response to the prompt."""
    messages_key: str = "messages"
    """Fine-tuning: column with a conversation, read in rows without a response; every turn of the
    assistant trains. Its limit is max_prompt_length + max_response_length."""
    train_max_samples: int = -1
    """Rows of train_files that are read: with `shuffle` so many drawn by `seed`, otherwise the
    first; -1: all."""
    val_max_samples: int = -1
    """The same of val_files."""
    train_batch_size: int = 1024
    """Prompts per step; each gets `rollout.n` responses."""
    gen_batch_size: int | None = None
    """Prompts answered at a time with algorithm.filter_groups or rollout.stop_stragglers; None:
    train_batch_size."""
    val_batch_size: int | None = None
    """Prompts per validation batch; None takes all at once."""
    max_prompt_length: int = 1024
    """Most tokens of a prompt, chat template included."""
    max_response_length: int = 1024
    """Most tokens of a response, end token included."""
    filter_overlong_prompts: bool = False
    """Drop rows whose prompt is longer than `max_prompt_length`."""
    truncation: str = "error"
    """What becomes of a longer prompt that is not dropped: "error" stops the run, "left" cuts its
    beginning, "right" its end, "middle" keeps both ends."""
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    """Variables of the chat template, such as {"enable_thinking": false}."""
    continue_final_message: bool = False
    """Let responses go on where a prompt ends in a turn of the assistant; otherwise such a prompt
    is an error."""
    shuffle: bool = True
    """Visit the prompts in a new order each epoch; False keeps the order of the files."""
    seed: int = 0
    """Seed of that order."""

    def __post_init__(self) -> None:
        for key in ("train_files", "val_files"):
            value = cast("str | list[Any] | None", getattr(self, key))
            names = value if isinstance(value, list) else [value]
            is_paths = bool(names) and all(isinstance(name, str) and name for name in names)
            require(
                value is None or is_paths,
                f"data.{key}",
                value,
                "must be a path or a list of paths",
            )
        for key in ("train_batch_size", "max_prompt_length", "max_response_length"):
            require(getattr(self, key) > 0, f"data.{key}", getattr(self, key), "must be > 0")
        require(
            self.val_batch_size is None or self.val_batch_size > 0,
            "data.val_batch_size",
            self.val_batch_size,
            "must be > 0",
            "Leave it out to validate on all prompts at once.",
        )
        require(
            self.gen_batch_size is None or self.gen_batch_size > 0,
            "data.gen_batch_size",
            self.gen_batch_size,
            "must be > 0",
        )
        for name in ("train_max_samples", "val_max_samples"):
            most = getattr(self, name)
            rule = "must be -1 or at least 1"
            require(most == -1 or most >= 1, f"data.{name}", most, rule, "-1 reads all.")
        for name in (
            "conversation", "add_generation_prompt", "continue_final_message", "tokenize"
        ):  # fmt: skip
            value = self.apply_chat_template_kwargs.get(name)
            is_free = name not in self.apply_chat_template_kwargs
            key = f"data.apply_chat_template_kwargs.{name}"
            has_key = name == "continue_final_message"
            fix = f"Set data.{name}." if has_key else "Remove it."
            require(is_free, key, value, "is no variable of a template", fix)
        require_one_of("data.truncation", self.truncation, ["error", *_TRUNCATIONS])


def load_prompts(
    files: str | Sequence[str],
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_samples: int = -1,
) -> list[Prompt]:
    """Return the prompts of all files, in order, templated, tokenized and within the limit; at most
    `max_samples` of them unless it is -1.

    Raises:
        UserError: for the first file or row that is at fault, naming it.
    """
    check_template_variables(tokenizer, cfg.apply_chat_template_kwargs)

    def encode(row: Row) -> list[int] | None:
        return _encode_prompt(row, cfg, tokenizer)

    return [
        Prompt(
            uid=row.uid,
            token_ids=np.array(token_ids, np.int32),
            text=decode(tokenizer, token_ids),
            data_source=row.text(cfg.reward_fn_key, "It names the reward, such as 'gsm8k'."),
            ground_truth=_ground_truth(row, cfg.ground_truth_key),
            extra_info=row.mapping("extra_info"),
        )
        for row, token_ids in _encode_rows(_chosen_rows(files, cfg, max_samples), cfg, encode)
    ]


def load_sft_sequences(
    files: str | Sequence[str], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TokenSequence]:
    """Return every row as one sequence, a prompt with a response or a conversation.

    The loss mask is True on what the assistant says and on the tokens that end its turns; not on
    what a prompt has of it.

    Raises:
        UserError: for the first file or row that is at fault, naming it.
    """
    check_template_variables(tokenizer, cfg.apply_chat_template_kwargs)

    def encode(row: Row) -> TokenSequence | None:
        return _encode_sequence(row, cfg, tokenizer)

    rows = _chosen_rows(files, cfg, cfg.train_max_samples)
    return [sequence for _, sequence in _encode_rows(rows, cfg, encode)]


class ItemStream(Generic[Item]):
    """Batches of prompts or sequences, epoch after epoch, resumable from two integers.

    Each epoch visits the prompts in an order derived from (seed, epoch); what is left of it when
    fewer than a batch remain is not visited in that epoch.

    Args:
        items: all of them, in the order of their files.
        seed: of the order.
        shuffle: False visits them as they stand.
    """

    def __init__(self, items: Sequence[Item], *, seed: int = 0, shuffle: bool = True) -> None:
        self._items = items
        self._seed, self._shuffle = seed, shuffle
        self._enter(epoch=0, position=0)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def epoch(self) -> int:
        """Epoch that the latest batch came from, counted from 0."""
        return self._epoch

    def num_batches_per_epoch(self, n: int, key: str = "data.train_batch_size") -> int:
        """Return how many batches of `n` items an epoch has; `key` is where `n` comes from.

        Raises:
            UserError: if there are fewer than `n` items in all.
        """
        self._require_a_batch(n, key)
        return len(self._items) // n

    def next(self, n: int) -> list[Item]:
        """Return the next `n` items, all of one epoch.

        Raises:
            UserError: if there are fewer than `n` items in all.
        """
        self._require_a_batch(n)
        if self._position + n > len(self._items):
            self._enter(epoch=self._epoch + 1, position=0)
        batch = self._order[self._position : self._position + n]
        self._position += n
        return [self._items[i] for i in batch]

    def _require_a_batch(self, n: int, key: str = "data.train_batch_size") -> None:
        require(
            n <= len(self._items),
            key,
            n,
            f"is more than the {len(self._items)} rows of data.train_files",
            "Lower it or add data.",
        )

    def peek(self, n: int) -> list[Item]:
        """Return the first `n` items of the files, fewer if there are not as many."""
        return list(self._items[:n])

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands and what it runs over."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the stream that made `state` stood.

        Raises:
            UserError: if that stream had another number of items, seed or shuffle.
        """
        for key, value in self._identity().items():
            require(
                state.get(key, value)
                == value,  # checkpoints of before there was a digest have none
                f"data {key}",
                value,
                f"differs from the resumed run's {state.get(key)!r}",
                "Resume with the data and the data section of that run.",
            )
        self._enter(epoch=state["epoch"], position=state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "num_items": len(self._items),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "digest": self._digest,
        }

    @functools.cached_property
    def _digest(self) -> str:
        """Of all that the items hold: rows that were edited or reordered are other data."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self._items:
            digest.update(json.dumps(item, default=_plain, sort_keys=True).encode())
        return digest.hexdigest()

    def _enter(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(len(self._items)))
        if self._shuffle:
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)


def _plain(value: Any) -> Any:
    """Return what JSON has no form for as something that it has."""
    if is_dataclass(value):
        return {of_item.name: getattr(value, of_item.name) for of_item in fields(value)}
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _chosen_rows(
    files: str | Sequence[str], cfg: DataConfig, max_samples: int
) -> Iterator[Row] | list[Row]:
    rows = read_rows(files)
    if max_samples == -1:
        return rows
    if not cfg.shuffle:
        return itertools.islice(rows, max_samples)
    read = list(rows)
    drawn = random.Random(f"{cfg.seed}:max_samples").sample(
        range(len(read)), min(max_samples, len(read))
    )
    return [read[i] for i in sorted(drawn)]


def _encode_rows(
    rows: Iterable[Row], cfg: DataConfig, encode: Callable[[Row], Encoded | None]
) -> Iterator[tuple[Row, Encoded]]:
    """Yield every row with what `encode` makes of it; None: it is too long and dropped."""
    num_rows = num_dropped = 0
    for num_rows, row in enumerate(rows, start=1):  # noqa: B007  counted
        encoded = encode(row)
        if encoded is None:
            num_dropped += 1
        else:
            yield row, encoded
    if num_dropped:
        logger.info("dropped %d of %d prompts as too long", num_dropped, num_rows)
    require(
        num_dropped < num_rows,
        "data.max_prompt_length",
        cfg.max_prompt_length,
        f"is less than every one of the {num_rows} prompts, so all are dropped",
        "Raise it.",
    )


def _encode_prompt(
    row: Row, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Return the tokens of the prompt within the limit; None if it is dropped."""
    messages = _messages(row, cfg.prompt_key)
    if ends_with_assistant(messages) and not cfg.continue_final_message:
        raise row.error(
            cfg.prompt_key,
            "ends with a turn of the assistant, so that the answer may be among what is asked",
            "Remove that turn, or set data.continue_final_message=true to have it continued.",
        )
    try:
        token_ids = encode_prompt(tokenizer, messages, cfg.apply_chat_template_kwargs)
    except ChatTemplateError as error:
        raise row.error(cfg.prompt_key, str(error)) from None
    if len(token_ids) <= cfg.max_prompt_length:
        return token_ids
    if cfg.filter_overlong_prompts:
        return None
    if cfg.truncation == "error":
        raise row.error(
            cfg.prompt_key,
            f"{len(token_ids)} tokens, more than data.max_prompt_length={cfg.max_prompt_length}",
            "Raise it, or set data.truncation=left or data.filter_overlong_prompts=true.",
        )
    return _TRUNCATIONS[cfg.truncation](token_ids, cfg.max_prompt_length)


def _encode_sequence(
    row: Row, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenSequence | None:
    """Return what a row trains, within the limits; None if it is dropped."""
    if row.get(cfg.response_key) is None and row.get(cfg.messages_key) is not None:
        return _encode_messages(row, cfg, tokenizer)
    prompt_ids = _encode_prompt(row, cfg, tokenizer)
    if prompt_ids is None:
        return None
    fix = f"Nor is there a conversation in {cfg.messages_key!r} (data.messages_key)."
    response_ids = encode_response(tokenizer, row.text(cfg.response_key, fix))
    if len(response_ids) > cfg.max_response_length:
        raise row.error(
            cfg.response_key,
            f"{len(response_ids)} tokens, more than data.max_response_length="
            f"{cfg.max_response_length}",
            "Raise the limit or remove the row.",
        )
    return TokenSequence(
        token_ids=np.array(prompt_ids + response_ids, np.int32),
        loss_mask=np.arange(len(prompt_ids) + len(response_ids)) >= len(prompt_ids),
    )


def _encode_messages(
    row: Row, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenSequence | None:
    messages = _messages(row, cfg.messages_key)
    try:
        token_ids, loss_mask = encode_conversation(
            tokenizer, messages, cfg.apply_chat_template_kwargs
        )
    except ChatTemplateError as error:
        raise row.error(cfg.messages_key, str(error)) from None
    limit = cfg.max_prompt_length + cfg.max_response_length
    if len(token_ids) > limit:
        if cfg.filter_overlong_prompts:
            return None
        if cfg.truncation == "error":
            raise row.error(
                cfg.messages_key,
                f"{len(token_ids)} tokens, more than data.max_prompt_length + "
                f"data.max_response_length = {limit}",
                "Raise one, or set data.truncation=right or data.filter_overlong_prompts=true.",
            )
        cut = _TRUNCATIONS[cfg.truncation]
        token_ids, loss_mask = cut(token_ids, limit), cut(loss_mask, limit)
    if not any(loss_mask[1:]):
        raise row.error(cfg.messages_key, "the assistant says nothing that could train")
    return TokenSequence(
        token_ids=np.array(token_ids, np.int32), loss_mask=np.array(loss_mask, np.bool_)
    )


def _messages(row: Row, column: str) -> list[Message]:
    value = row.get(column)
    if not isinstance(value, list):
        fix = "It must be a string or a list of messages; data.prompt_key names the column."
        return [{"role": "user", "content": row.text(column, fix)}]
    if not value:
        raise row.error(column, "the list of messages is empty")
    return [
        _message(row, column, number, message)
        for number, message in enumerate(cast("list[Any]", value))
    ]


def _message(row: Row, column: str, number: int, message: object) -> Message:
    fix = f"Message {number} must be {{'role': ..., 'content': ...}} with both strings."
    if not isinstance(message, Mapping):
        raise row.error(column, f"message {number} is no object", fix)
    message = cast("Message", message)
    role = row.check_text(column, message.get("role"), fix)
    content, calls = message.get("content"), message.get("tool_calls")
    if content is not None or role != "assistant" or not calls:
        # What a system prompt, a tool or an assistant that calls one may leave empty, a user fills.
        row.check_text(column, content, fix, may_be_empty=role != "user")
    return {**_without_nulls(message), "content": content}


def _without_nulls(value: Any) -> Any:
    """Return an object without its nulls, at any depth: Parquet gives every message and every call
    the keys of all, and those that are absent come as null."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {key: _without_nulls(part) for key, part in items if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in cast("list[Any]", value)]
    return value


def _ground_truth(row: Row, key: str) -> Any:
    value, also = row.at(key), ""
    if value is None and key == "ground_truth":
        value = row.mapping("reward_model").get("ground_truth")
        also = ", nor one at reward_model.ground_truth"
    fix = (
        "It is the reference answer that the reward compares with; data.ground_truth_key names it."
    )
    if value is None:
        raise row.error(key, f"there is no value{also}", fix)
    if isinstance(value, float) and math.isinf(value):
        raise row.error(key, f"{value} is no number", fix)
    return value
