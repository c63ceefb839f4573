"""The data that flows through the system, in the order in which it is made.

    Prompt -> Sample -> SampleGroup -> TokenSequence -> MinibatchPlan -> Share -> MicroBatch

Carriers are frozen; a later stage returns a copy made with `dataclasses.replace`. What they hold
per token are numpy arrays (int32 ids, bool masks, float32 numbers) of the length of `token_ids`;
lists become arrays when a carrier is made. The value at `i` belongs to the token at `i` (the shift
to next-token targets happens once, in `data/batch.py`). Values where `loss_mask` is False are 0.0.
Numbers that a stage has not made, or that nobody asked for, are None.

Carriers with arrays are equal only if they are the same object.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from operator import attrgetter
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.float32]

NUMBERS = (
    "rollout_logprobs",
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "returns",
)
"""Fields with a number per token that samples and sequences may carry."""

_DTYPES = {
    "token_ids": np.dtype(np.int32),
    "loss_mask": np.dtype(np.bool_),
    **dict.fromkeys(NUMBERS, np.dtype(np.float32)),
}


_ALL_PER_TOKEN = tuple((name, attrgetter(name), dtype) for name, dtype in _DTYPES.items())


def _hold_arrays(carrier: Sample | TokenSequence, fields: Iterable[Any] = _ALL_PER_TOKEN) -> None:
    """Convert a carrier's values per token to arrays, each as long as `token_ids`.

    Args:
        carrier: new.
        fields: those to look at, of `_ALL_PER_TOKEN`.
    """
    length = len(carrier.token_ids)
    for name, get, dtype in fields:
        given = get(carrier)
        if given is None:
            continue
        if type(given) is not np.ndarray or given.dtype is not dtype:
            object.__setattr__(carrier, name, np.asarray(given, dtype))
        assert len(given) == length, f"{name} is not as long as token_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesAt:
    """Where the routes of a sequence are stored: in the worker that recorded them, which sends them
    to the workers that replay them. They are large, hundreds of bytes per token, so the controller
    does not hold them."""

    rank: int
    key: int
    """Number in that rank's `RouteStore`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One task: what the model is given and what is needed to judge its answer."""

    uid: str
    """Names the row it came from, for messages, logs and seeds: "train.parquet:17"; where several
    files have that name "train.parquet#2:17", of the second of them."""
    token_ids: Ids
    """The chat template applied and tokenized: [3, 15, 9, 4]."""
    text: str
    """What `token_ids` decode to, for logs."""
    data_source: str
    """Selects the reward: "gsm8k"."""
    ground_truth: Any
    """Reference answer, handed to the reward as it stands in the data: "72"."""
    extra_info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Anything else of the row that a reward may want."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, np.int32))


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens `start` to `end` - 1, drawn with weights of one version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One prompt with one response and the results about it."""

    prompt: Prompt
    index: int
    """Position in its group: 0 .. n-1."""
    token_ids: Ids
    """Prompt and response, one array."""
    loss_mask: Mask
    """True on tokens that train: the response's."""
    rollout_logprobs: Numbers
    """Returned by the engine while sampling; natural log, after temperature."""
    finish_reason: str
    """"stop" (end token), "length" (limit reached) or "abort"."""
    versions: Sequence[VersionSpan] = ()
    """Versions of the weights that drew the response, in token order and without a gap. A version
    is the step for which the engine held the weights."""
    response_text: str = ""
    """The response decoded without special tokens; what rewards read."""
    reward: float = 0.0
    """Scalar score of the sample."""
    reward_status: str = "scored"
    """"scored", or why the reward is 0.0 without a score: "failed" or "timeout"."""
    answer: str | None = None
    """The answer that the response states, as the reward reads it: "72"; "" for none. None: the
    reward gives no answers."""
    reward_metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further numbers of the reward function, logged as `reward/<name>/mean`, or as
    `eval/<data source>/<name>/mean` in validation."""
    advantages: Numbers | None = None
    """None until advantages are assigned."""
    old_logprobs: Numbers | None = None
    """Recomputed by the trainer before the first update of the step; None until then."""
    ref_logprobs: Numbers | None = None
    """Under the reference model; None unless a KL term asks for it."""
    values: Numbers | None = None
    """The critic's values of the state in which each token was chosen; None without a critic."""
    returns: Numbers | None = None
    """The targets for these values; None without a critic."""
    routed_experts: RoutesAt | None = None
    """Where its routes lie. None unless they are replayed: of the engine (R3) or of the pass that
    computed `old_logprobs` (R2)."""

    def __post_init__(self) -> None:
        _hold_arrays(self)

    @property
    def weight_version(self) -> int:
        """Version of the oldest weights that drew a token of it; -1 if there is no token."""
        return min((span.version for span in self.versions), default=-1)

    @property
    def num_response_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt.token_ids)

    def to_sequence(self) -> TokenSequence:
        """Return the part of the sample that the actor reads."""
        return TokenSequence(
            token_ids=self.token_ids,
            loss_mask=self.loss_mask,
            rollout_logprobs=self.rollout_logprobs,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            routed_experts=self.routed_experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleGroup:
    """The samples of one prompt."""

    prompt: Prompt
    samples: Sequence[Sample]
    baseline_reward: float | None = None
    """Reward of a greedy response to the prompt; None unless the estimator asks for it."""


def with_sample_fields(groups: Sequence[SampleGroup], **fields: Iterable[Any]) -> list[SampleGroup]:
    """Return the groups with fields of their samples set.

    Args:
        groups: in any order.
        fields: by name, one value per sample, in the order of the groups; at least one.
    """
    names, rows = tuple(fields), zip(*fields.values(), strict=True)
    is_every = "token_ids" in fields  # whose length all others have
    per_token = [of_field for of_field in _ALL_PER_TOKEN if is_every or of_field[0] in fields]
    made = [
        replace(
            group,
            samples=[_with(sample, names, next(rows), per_token) for sample in group.samples],
        )
        for group in groups
    ]
    assert next(rows, None) is None, f"more values of {', '.join(fields)} than samples"
    return made


_all_fields = attrgetter(*Sample.__slots__)
_SETTERS = tuple(getattr(Sample, name).__set__ for name in Sample.__slots__)


def _with(
    sample: Sample, names: Sequence[str], values: Iterable[Any], per_token: Iterable[Any]
) -> Sample:
    """Return the same as `replace(sample, **dict(zip(names, values)))`, in a fraction of its time:
    unchanged fields are not checked again."""
    made = object.__new__(Sample)
    for set_field, value in zip(_SETTERS, _all_fields(sample), strict=True):
        set_field(made, value)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    _hold_arrays(made, per_token)
    return made


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequence:
    """One sequence as the trainer sees it: tokens, mask and per-token inputs of the losses.

    Numbers are None where the chosen loss does not need them.
    """

    token_ids: Ids
    loss_mask: Mask
    """True on tokens whose prediction trains; the first token is never predicted."""
    rollout_logprobs: Numbers | None = None
    advantages: Numbers | None = None
    old_logprobs: Numbers | None = None
    ref_logprobs: Numbers | None = None
    values: Numbers | None = None
    returns: Numbers | None = None
    routed_experts: np.ndarray | RoutesAt | None = None
    """[len(token_ids) - 1, MoE layers, topk] unsigned integers: at i the experts of token i as an
    input, in the order of the layers; the last token is no input. Or where they lie; None: the
    router chooses."""

    def __post_init__(self) -> None:
        _hold_arrays(self)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that train; the first token has no prediction and does not count."""
        return int(np.count_nonzero(self.loss_mask[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over a whole minibatch and all data-parallel ranks; fixed when it is planned."""

    num_tokens: int
    """Trained tokens."""
    num_sequences: int
    """Sequences with at least one trained token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MinibatchPlan:
    """How the sequences of one optimizer update (or one forward-only pass) are cut."""

    lengths: Sequence[int]
    """Tokens of each sequence that was planned."""
    micro_batches: Sequence[Sequence[Sequence[int]]]
    """Outer: one entry per data-parallel rank; inner: as many on every rank, each the positions of
    its sequences in the list that was planned; may be empty."""
    denominators: Denominators


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Sequences that one forward (and backward) takes as one packed row; may be empty.

    They lie end to end, N tokens of S sequences; see `TokenSequence` for what is not said here.
    """

    indices: Ids
    """[S], position of each sequence in the list that was planned; results return by it."""
    lengths: Ids
    """[S], tokens of each."""
    token_ids: Ids
    """[N]; all that follows too."""
    loss_mask: Mask
    rollout_logprobs: Numbers | None = None
    advantages: Numbers | None = None
    old_logprobs: Numbers | None = None
    ref_logprobs: Numbers | None = None
    values: Numbers | None = None
    returns: Numbers | None = None
    routed_experts: np.ndarray | None = None
    """[N - S, MoE layers, topk]: the last token of a sequence is no input."""
    routes_at: np.ndarray | None = None
    """[S, 2] int64, rank and key of the routes of each sequence: until a worker has put them in."""

    @classmethod
    def of(
        cls,
        sequences: Sequence[TokenSequence],
        indices: Sequence[int] | None = None,
        reads: Collection[str] = (*NUMBERS, "routed_experts"),
    ) -> MicroBatch:
        """Return the sequences laid end to end; either all carry an optional value or none does.

        Args:
            sequences: at least one token each.
            indices: of the sequences; None: as they stand.
            reads: optional values to take along where the sequences carry them.
        """

        token_ids = [sequence.token_ids for sequence in sequences]
        masks = [sequence.loss_mask for sequence in sequences]
        carried = {name: parts for name in reads if (parts := _carried(sequences, name))}
        routes = carried.pop("routed_experts", [])
        at = [(x.rank, x.key) for x in routes if isinstance(x, RoutesAt)]
        assert len(at) in (0, len(routes)), "the routes of some sequences lie elsewhere"
        return cls(
            indices=np.asarray(range(len(sequences)) if indices is None else indices, np.int32),
            lengths=np.asarray([len(ids) for ids in token_ids], np.int32),
            token_ids=np.concatenate(token_ids) if token_ids else np.zeros(0, np.int32),
            loss_mask=np.concatenate(masks) if masks else np.zeros(0, np.bool_),
            **{name: np.concatenate(parts) for name, parts in carried.items()},
            routes_at=np.array(at, np.int64) if at else None,
            routed_experts=np.concatenate(routes) if routes and not at else None,
        )

    def cut(self, first: int, last: int) -> MicroBatch:
        """Return sequences `first` to `last` - 1, without copying."""
        start, stop = int(self.lengths[:first].sum()), int(self.lengths[:last].sum())
        numbers = {name: getattr(self, name) for name in NUMBERS}
        routes, at = self.routed_experts, self.routes_at
        return MicroBatch(
            indices=self.indices[first:last],
            lengths=self.lengths[first:last],
            token_ids=self.token_ids[start:stop],
            loss_mask=self.loss_mask[start:stop],
            **{name: None if x is None else x[start:stop] for name, x in numbers.items()},
            routed_experts=None if routes is None else routes[start - first : stop - last],
            routes_at=None if at is None else at[first:last],
        )


def _carried(sequences: Sequence[TokenSequence], name: str) -> list[Any]:
    """Return an optional value of all sequences, [] if none carries it."""
    carried = [value for value in map(attrgetter(name), sequences) if value is not None]
    is_alike = len(carried) in (0, len(sequences))
    assert is_alike, f"some sequences of a micro-batch carry {name} and some do not"
    return carried


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share(Sequence[MicroBatch]):
    """The micro-batches of one data-parallel rank in a pass, in the form in which they are sent: a
    few arrays, for any number of sequences."""

    whole: MicroBatch
    """All of them, end to end."""
    ends: Ids
    """[number of micro-batches], where each ends among the sequences."""

    @classmethod
    def of(
        cls,
        sequences: Sequence[TokenSequence],
        micro_batches: Sequence[Sequence[int]],
        reads: Collection[str] = (*NUMBERS, "routed_experts"),
    ) -> Share:
        """Return the share of a rank.

        Args:
            sequences: all that were planned.
            micro_batches: of the rank, the positions of the sequences in each.
            reads: optional values that the pass reads, taken along where the sequences carry them.
        """
        indices = [index for micro_batch in micro_batches for index in micro_batch]
        return cls(
            whole=MicroBatch.of([sequences[index] for index in indices], indices, reads),
            ends=np.cumsum([len(micro_batch) for micro_batch in micro_batches], dtype=np.int32),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return self.whole.cut(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenNumbers:
    """A number for every token of some sequences, as a rank returns them: logprobs, values."""

    indices: Ids
    """[S], position of each sequence in the list that was planned."""
    lengths: Ids
    """[S], tokens of each."""
    numbers: Numbers
    """[N], those of all sequences end to end; 0.0 at first tokens and where nothing trains."""

    def by_index(self) -> Iterator[tuple[int, Numbers]]:
        """Yield (position in the list that was planned, its numbers) of each sequence."""
        stops = np.cumsum(self.lengths)
        for index, stop, length in zip(
            self.indices.tolist(), stops.tolist(), self.lengths.tolist(), strict=True
        ):
            yield index, self.numbers[stop - length : stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The experts of a model, for everyone who handles routes."""

    layers: Sequence[int]
    """Decoder layers with experts, from 0: (0, 1, 2, 3), or (1, 3) where every second is dense."""
    num_experts: int
    """Routed experts in each of these layers: 128."""
    topk: int
    """Experts per token: 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes; world_size = tp * pp * cp * dp."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def name(self) -> str:
        """Short name, as `mcore-rl verify` takes it: "tp2pp2ep4etp1"; "" if nothing is sharded."""
        axes = ("tp", "pp", "vpp", "cp", "ep")
        parts = [f"{axis}{getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1]
        return "".join([*parts, f"etp{self.etp}" if self.etp != self.tp else ""])

    @property
    def micro_batch_multiple(self) -> int:
        """The number of micro-batches of a rank is a multiple of it: an interleaved pipeline needs
        a multiple of its stages."""
        return self.pp if self.vpp > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteState:
    """A rank's state of writing its part of a checkpoint."""

    is_done: bool
    problem: str = ""
    """Why it cannot be written: ".../actor cannot be written: No space left on device"."""


class Part(StrEnum):
    """A part of a model's state that may leave its device for host memory."""

    PARAM = "param"
    """Weights, frozen ones among them."""
    GRAD = "grad"
    """Gradient buffers."""
    OPTIMIZER = "optimizer"
    """Float32 masters and moments."""
    REFERENCE = "reference"
    """Weights of the frozen copy that the actor keeps of the first model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloads:
    """The parts that are in host memory while not needed, from the start of the workers."""

    actor: frozenset[Part] = frozenset()
    critic: frozenset[Part] = frozenset()
    reference: Part = Part.REFERENCE
    """Which part of the actor the reference reads: under adapters the weights themselves."""
