"""Rows to prompts, and the order in which the loop sees them.

Invariants:
- A row either becomes a prompt (or a sequence of supervised fine-tuning) or stops the run with one
  line that names file, row, column and the way out; only `data.filter_overlong_prompts` drops rows.
- The order of prompts is a function of (seed, epoch) alone, so two integers resume it exactly.

Columns read: the ones that `data.prompt_key` and `data.reward_fn_key` name, `ground_truth` (or
`reward_model.ground_truth`) and `extra_info`; `response` for supervised fine-tuning.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mcore_rl.data.chat import (
    ChatTemplateError,
    Message,
    check_template_variables,
    encode_prompt,
    encode_response,
)
from mcore_rl.data.rows import Row, read_rows
from mcore_rl.errors import require, require_one_of
from mcore_rl.types import Prompt, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def _cut_middle(token_ids: list[int], length: int) -> list[int]:
    head = length // 2
    return token_ids[:head] + token_ids[len(token_ids) - (length - head) :]


_TRUNCATIONS: dict[str, Callable[[list[int], int], list[int]]] = {
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
    train_batch_size: int = 1024
    """Prompts per step; each gets `rollout.n` responses."""
    gen_batch_size: int | None = None
    """Prompts answered at a time with algorithm.filter_groups; None: train_batch_size."""
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
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as {"enable_thinking": false}."""
    shuffle: bool = True
    """Visit the prompts in a new order each epoch; False keeps the order of the files."""
    seed: int = 0
    """Seed of that order."""

    def __post_init__(self) -> None:
        for key in ("train_files", "val_files"):
            value = getattr(self, key)
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
        for name in ("conversation", "add_generation_prompt", "tokenize"):
            value = self.apply_chat_template_kwargs.get(name)
            is_free = name not in self.apply_chat_template_kwargs
            key = f"data.apply_chat_template_kwargs.{name}"
            require(is_free, key, value, "is no variable of a template", "Remove it.")
        require_one_of("data.truncation", self.truncation, ["error", *_TRUNCATIONS])


def load_prompts(
    files: str | Sequence[str], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Return the prompts of all files, in order, templated, tokenized and within the limit.

    Raises:
        UserError: for the first file or row that is at fault, naming it.
    """
    return [
        Prompt(
            uid=row.uid,
            token_ids=token_ids,
            text=str(tokenizer.decode(token_ids)),
            data_source=row.text(cfg.reward_fn_key, "It names the reward, such as 'gsm8k'."),
            ground_truth=_ground_truth(row),
            extra_info=row.mapping("extra_info"),
        )
        for row, token_ids in _encode_rows(files, cfg, tokenizer)
    ]


def load_sft_sequences(
    files: str | Sequence[str], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[TokenSequence]:
    """Return prompt and response of every row as one sequence whose response trains.

    The loss mask is True on the response's tokens and on the token that ends its turn.

    Raises:
        UserError: for the first file or row that is at fault, naming it.
    """
    sequences = []
    for row, prompt_ids in _encode_rows(files, cfg, tokenizer):
        response_ids = encode_response(tokenizer, row.text("response"))
        if len(response_ids) > cfg.max_response_length:
            raise row.error(
                "response",
                f"{len(response_ids)} tokens, more than data.max_response_length="
                f"{cfg.max_response_length}",
                "Raise the limit or remove the row.",
            )
        sequences.append(
            TokenSequence(
                token_ids=prompt_ids + response_ids,
                loss_mask=[False] * len(prompt_ids) + [True] * len(response_ids),
            )
        )
    return sequences


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
                state[key] == value,
                f"data {key}",
                value,
                f"differs from the resumed run's {state[key]!r}",
                "Resume with the data and the data section of that run.",
            )
        self._enter(epoch=state["epoch"], position=state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"num_items": len(self._items), "seed": self._seed, "shuffle": self._shuffle}

    def _enter(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(len(self._items)))
        if self._shuffle:
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)


def _encode_rows(
    files: str | Sequence[str], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Row, list[int]]]:
    """Yield every row that is not dropped with the token ids of its prompt."""
    check_template_variables(tokenizer, cfg.apply_chat_template_kwargs)
    num_rows = num_dropped = 0
    for num_rows, row in enumerate(read_rows(files), start=1):  # noqa: B007  counted
        try:
            token_ids = encode_prompt(
                tokenizer, _messages(row, cfg.prompt_key), cfg.apply_chat_template_kwargs
            )
        except ChatTemplateError as error:
            raise row.error(cfg.prompt_key, str(error)) from None
        if len(token_ids) > cfg.max_prompt_length:
            if cfg.filter_overlong_prompts:
                num_dropped += 1
                continue
            token_ids = _truncate(token_ids, row, cfg)
        yield row, token_ids
    if num_dropped:
        logger.info("dropped %d of %d prompts as too long", num_dropped, num_rows)
    require(
        num_dropped < num_rows,
        "data.max_prompt_length",
        cfg.max_prompt_length,
        f"is less than every one of the {num_rows} prompts, so all are dropped",
        "Raise it.",
    )


def _truncate(token_ids: list[int], row: Row, cfg: DataConfig) -> list[int]:
    if cfg.truncation == "error":
        raise row.error(
            cfg.prompt_key,
            f"{len(token_ids)} tokens, more than data.max_prompt_length={cfg.max_prompt_length}",
            "Raise it, or set data.truncation=left or data.filter_overlong_prompts=true.",
        )
    return _TRUNCATIONS[cfg.truncation](token_ids, cfg.max_prompt_length)


def _messages(row: Row, column: str) -> list[Message]:
    value = row.get(column)
    if not isinstance(value, list):
        fix = "It must be a string or a list of messages; data.prompt_key names the column."
        return [{"role": "user", "content": row.text(column, fix)}]
    if not value:
        raise row.error(column, "the list of messages is empty")
    return [_message(row, column, number, message) for number, message in enumerate(value)]


def _message(row: Row, column: str, number: int, message: object) -> Message:
    fix = f"Message {number} must be {{'role': ..., 'content': ...}} with both strings."
    if not isinstance(message, Mapping):
        raise row.error(column, f"message {number} is no object", fix)
    for key in ("role", "content"):
        row.check_text(column, message.get(key), fix)
    # Parquet gives every message the keys of all messages; absent ones come as null.
    return {key: value for key, value in message.items() if value is not None}


def _ground_truth(row: Row) -> Any:
    value = row.get("ground_truth")
    if value is None:
        value = row.mapping("reward_model").get("ground_truth")
    fix = "It is the reference answer that the reward compares with."
    if value is None:
        problem = "there is no value, nor one at reward_model.ground_truth"
        raise row.error("ground_truth", problem, fix)
    if isinstance(value, float) and math.isinf(value):
        raise row.error("ground_truth", f"{value} is no number", fix)
    return value
