"""Everything that was generated is trained on or given up for a reason."""

from __future__ import annotations

import json

import pytest

from mcore_rl.errors import RunError
from mcore_rl.loop.ledger import Ledger
from mcore_rl.metrics import to_floats
from mcore_rl.types import SampleGroup
from tests.carriers import make_prompt, make_sample

PROMPT = make_prompt(uid="a", token_ids=[5, 6], text="", data_source="s", ground_truth="")


def group(*lengths: int) -> SampleGroup:
    samples = [
        make_sample(
            prompt=PROMPT,
            index=index,
            token_ids=[5, 6, *[7] * length],
            loss_mask=[False, False, *[True] * length],
            rollout_logprobs=[0.0] * (2 + length),
            finish_reason="stop",
        )
        for index, length in enumerate(lengths)
    ]
    return SampleGroup(prompt=PROMPT, samples=samples)


def test_both_sides_are_counted_in_prompts_samples_and_tokens():
    ledger, groups = Ledger(), [group(3, 4), group(5, 6)]
    ledger.generated(groups)
    ledger.generated([group(1)])
    ledger.trained(groups[:1])
    ledger.discarded("alike", groups[1:])
    ledger.discarded("baseline", [group(1)])
    ledger.discarded("surplus", [])
    assert to_floats(ledger.balance()) == {
        "ledger/generated/prompts": 3,
        "ledger/generated/samples": 5,
        "ledger/generated/tokens": 19,
        "ledger/trained/prompts": 1,
        "ledger/trained/samples": 2,
        "ledger/trained/tokens": 7,
        "ledger/discarded/alike/prompts": 1,
        "ledger/discarded/alike/samples": 2,
        "ledger/discarded/alike/tokens": 11,
        "ledger/discarded/baseline/prompts": 1,
        "ledger/discarded/baseline/samples": 1,
        "ledger/discarded/baseline/tokens": 1,
    }


@pytest.mark.parametrize("used", [[], [group(3), group(3)], [group(4)]])
def test_a_group_that_is_lost_or_used_twice_or_another_one_ends_the_run(used):
    ledger = Ledger()
    ledger.generated([group(3)])
    ledger.trained(used)
    with pytest.raises(RunError, match=r"does not balance, in (prompts|tokens): generated "):
        ledger.balance()


def test_a_resumed_run_goes_on_counting():
    ledger, resumed = Ledger(), Ledger()
    ledger.generated([group(3)])
    ledger.trained([group(3)])
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    for one in (ledger, resumed):
        one.generated([group(2)])
        one.discarded("surplus", [group(2)])
    assert resumed.balance() == ledger.balance()
