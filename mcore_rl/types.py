"""What flows through the system, in the order in which it is made.

    Prompt -> Sample -> SampleGroup -> TokenSequence -> MicroBatch -> MinibatchPlan -> UpdateResult

Carriers are frozen; a later stage returns a copy made with `dataclasses.replace`. Per-token lists
all have the length of `token_ids`, and the value at `i` belongs to the token at `i` (the shift to
next-token targets happens once, in `data/batch.py`). Values where `loss_mask` is False are 0.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task: what the model is given and what is needed to judge its answer."""

    uid: str
    """Names the row it came from, for messages, logs and seeds: "train.parquet:17"; where several
    files have that name "train.parquet#2:17", of the second of them."""
    token_ids: Sequence[int]
    """The chat template applied and tokenized: [3, 15, 9, 4]."""
    text: str
    """What `token_ids` decode to, for logs."""
    data_source: str
    """Selects the reward: "gsm8k"."""
    ground_truth: Any
    """Reference answer, handed to the reward as it stands in the data: "72"."""
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    """Anything else of the row that a reward may want."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt with one response and what became known about it."""

    prompt: Prompt
    index: int
    """Position in its group: 0 .. n-1."""
    token_ids: Sequence[int]
    """Prompt and response, one list."""
    loss_mask: Sequence[bool]
    """True on tokens that train: the response's."""
    rollout_logprobs: Sequence[float]
    """Returned by the engine while sampling; natural log, after temperature."""
    finish_reason: str
    """"stop" (end token), "length" (limit reached) or "abort"."""
    weight_version: int
    """Step whose weights the engine held."""
    response_text: str = ""
    """The response decoded without special tokens; what rewards read."""
    reward: float = 0.0
    """Scalar score of the sample."""
    reward_status: str = "scored"
    """"scored", or why the reward is 0.0 without a score: "failed" or "timeout"."""
    reward_metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of the reward function, logged as `reward/<name>/mean`, or as
    `eval/<data source>/<name>/mean` in validation."""
    advantages: Sequence[float] = ()
    """Empty until advantages are assigned."""
    old_logprobs: Sequence[float] = ()
    """Recomputed by the trainer before the first update of the step; empty until then."""
    ref_logprobs: Sequence[float] = ()
    """Under the reference model; empty unless a KL term asks for it."""
    values: Sequence[float] = ()
    """The critic's, of the state in which each token was chosen; empty without a critic."""
    returns: Sequence[float] = ()
    """What these values should have been; empty without a critic."""
    routed_experts: np.ndarray | None = field(default=None, compare=False)
    """[len(token_ids) - 1, MoE layers, topk] unsigned integers: at i the experts of token i as an
    input, in the order of the layers; the last token is no input. None unless routes are replayed:
    of the engine (R3) or of the pass that computed `old_logprobs` (R2). Not compared: arrays are
    not equal or unequal as a whole."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
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
        fields: by name, one value per sample, in the order of the groups.
    """
    values = {name: iter(of_sample) for name, of_sample in fields.items()}
    return [
        replace(
            group,
            samples=[
                replace(sample, **{name: next(items) for name, items in values.items()})
                for sample in group.samples
            ],
        )
        for group in groups
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One sequence as the trainer sees it: tokens, mask and per-token inputs of the losses.

    Optional lists are either empty (not needed by the chosen loss) or as long as `token_ids`.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool]
    """True on tokens whose prediction trains; the first token is never predicted."""
    rollout_logprobs: Sequence[float] = ()
    advantages: Sequence[float] = ()
    old_logprobs: Sequence[float] = ()
    ref_logprobs: Sequence[float] = ()
    values: Sequence[float] = ()
    returns: Sequence[float] = ()
    routed_experts: np.ndarray | None = field(default=None, compare=False)
    """See `Sample.routed_experts`; None: the router chooses."""

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that train; the first token has no prediction and does not count."""
        return sum(self.loss_mask[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences that one forward (and backward) takes as one packed row; may be empty."""

    sequences: Sequence[TokenSequence]
    indices: Sequence[int]
    """Position of each sequence in the list that was planned; results return by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over a whole minibatch and all data-parallel ranks; fixed when it is planned."""

    num_tokens: int
    """Trained tokens."""
    num_sequences: int
    """Sequences with at least one trained token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MinibatchPlan:
    """How the sequences of one optimizer update (or one forward-only pass) are cut."""

    micro_batches: Sequence[Sequence[MicroBatch]]
    """Outer: one entry per data-parallel rank; inner: as many on every rank."""
    denominators: Denominators


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
        """In short, as `mcore-rl verify` takes it: "tp2pp2ep4etp1"; "" where nothing is cut."""
        axes = ("tp", "pp", "vpp", "cp", "ep")
        parts = [f"{axis}{getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1]
        return "".join([*parts, f"etp{self.etp}" if self.etp != self.tp else ""])

    @property
    def micro_batch_multiple(self) -> int:
        """The micro-batches of a rank are a multiple of it: an interleaved pipeline asks for one of
        its stages."""
        return self.pp if self.vpp > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteState:
    """How far a rank is with writing its part of a checkpoint."""

    is_done: bool
    problem: str = ""
    """Why it cannot be written: ".../actor cannot be written: No space left on device"."""
