"""Carriers: what a later stage sets of samples, and what stays."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from mcore_rl.types import (
    NUMBERS,
    RoutesAt,
    Sample,
    SampleGroup,
    VersionSpan,
    with_sample_fields,
)
from tests import carriers


def make_groups():
    """Return groups whose samples have a value of their own in every field."""
    groups = []
    for number in range(2):
        prompt = carriers.make_prompt(
            uid=f"p:{number}", token_ids=[1, 2], text="", data_source="", ground_truth=""
        )
        groups.append(
            SampleGroup(prompt=prompt, samples=[make_sample(prompt, i) for i in range(3)])
        )
    return groups


def make_sample(prompt, index):
    length = 4 + index
    numbers = {name: [float(index), *[0.5] * (length - 1)] for name in NUMBERS}
    return carriers.make_sample(
        prompt=prompt,
        index=index,
        token_ids=range(length),
        loss_mask=[False, False, *[True] * (length - 2)],
        finish_reason="length",
        versions=[VersionSpan(7, 0, length - 2)],
        response_text=f"text {index}",
        reward=float(index),
        reward_status="timeout",
        reward_metrics={"length": float(index)},
        routed_experts=RoutesAt(rank=1, key=index),
        **numbers,
    )


def samples_of(groups):
    return [sample for group in groups for sample in group.samples]


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Sample) if field.name not in ("token_ids", "prompt")]
)
def test_a_field_is_set_by_sample_and_all_others_stay_what_they_were(name):
    groups = make_groups()
    values = [object() if name not in ("loss_mask", *NUMBERS) else np.ones(len(s.token_ids))
              for s in samples_of(groups)]  # fmt: skip
    made = with_sample_fields(groups, **{name: values})
    for group, given in zip(made, groups, strict=True):
        assert group.prompt is given.prompt
    for sample, given, value in zip(samples_of(made), samples_of(groups), values, strict=True):
        np.testing.assert_array_equal(getattr(sample, name), value)
        for field in fields(Sample):
            if field.name != name:
                assert getattr(sample, field.name) is getattr(given, field.name), field.name


@pytest.mark.parametrize("name", ["loss_mask", *NUMBERS])
def test_what_is_set_per_token_becomes_the_array_that_replace_would_make(name):
    groups = make_groups()
    values = [[1] * len(sample.token_ids) for sample in samples_of(groups)]
    made = samples_of(with_sample_fields(groups, **{name: values}))
    for sample, given, value in zip(made, samples_of(groups), values, strict=True):
        wanted = getattr(replace(given, **{name: value}), name)
        assert getattr(sample, name).dtype == wanted.dtype
        np.testing.assert_array_equal(getattr(sample, name), wanted)


def test_numbers_of_another_length_than_the_sample_are_refused():
    groups = make_groups()
    values = [np.zeros(len(sample.token_ids) - 1) for sample in samples_of(groups)]
    with pytest.raises(AssertionError, match="advantages is not as long as token_ids"):
        with_sample_fields(groups, advantages=values)


def test_more_values_than_samples_are_refused():
    groups = make_groups()
    with pytest.raises(AssertionError, match="more values of reward than samples"):
        with_sample_fields(groups, reward=[0.0] * 7)


def test_a_field_that_samples_do_not_have_is_refused():
    groups = make_groups()
    with pytest.raises(AttributeError, match="advantage"):
        with_sample_fields(groups, advantage=[0.0] * 6)
