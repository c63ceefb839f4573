"""The page's own parts: sampling agrees with the training forward, and two steps train."""

from __future__ import annotations

import random

import pytest
import torch

TINY = [
    *["--sft-steps", "2", "--sft-batch-size", "2", "--steps", "2", "--prompts", "2"],
    *["--minibatch", "1", "--n", "3", "--val-prompts", "2"],
]


@pytest.fixture(scope="module")
def page(load_example):
    return load_example("transparent_grpo", "transparent_grpo")


def test_two_steps_train_and_the_seed_fixes_them(page, capsys):
    outputs = []
    for _ in range(2):
        before, after = page.main(TINY)
        assert 0 <= min(before, after) <= max(before, after) <= 1
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "step    0" in outputs[0]


def test_sampled_logprobs_are_those_of_the_training_forward(page):
    """Left-padded prompts of several lengths and a cache there, right-padded rows here."""
    tokenizer = page.make_tokenizer()
    model = page.make_model(tokenizer, 0)
    rng = random.Random(0)
    prompts = [
        page.make_prompt(page.draw(rng, held_out=False), tokenizer, str(i)) for i in range(4)
    ]
    assert len({len(prompt.token_ids) for prompt in prompts}) > 1
    groups = page.generate(model, tokenizer, prompts, 2, step=0)
    samples = [sample for group in groups for sample in group.samples]
    assert [group.prompt for group in groups] == prompts
    again_T = page.logprobs(model, [sample.token_ids for sample in samples])
    expected_T = torch.tensor([x for sample in samples for x in sample.rollout_logprobs])
    mask_T = torch.tensor([x for sample in samples for x in sample.loss_mask])
    # float32, sums of 100 terms: 2e-6 observed.
    assert (again_T - expected_T)[mask_T].abs().max() < 1e-4


def test_an_update_raises_what_has_an_advantage(page):
    tokenizer = page.make_tokenizer()
    model = page.make_model(tokenizer, 0)
    prompt = page.make_prompt(page.draw(random.Random(0), held_out=False), tokenizer, "0")
    (group,) = page.generate(model, tokenizer, [prompt], 2, step=0)
    rewarded = [
        page.replace(sample, reward=float(i == 0), old_logprobs=sample.rollout_logprobs)
        for i, sample in enumerate(group.samples)
    ]
    (group,), _ = page.assign_advantages(
        [page.replace(group, samples=rewarded)], page.AlgorithmConfig()
    )

    def total(sample):
        mask_T = torch.tensor(sample.loss_mask)
        with torch.no_grad():
            return float(page.logprobs(model, [sample.token_ids])[mask_T].mean())

    before = [total(sample) for sample in group.samples]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    objective = page.resolve_objective(page.ObjectiveConfig(), page.MAX_RESPONSE_LENGTH)
    page.update(model, optimizer, [group], objective)
    after = [total(sample) for sample in group.samples]
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_problems_for_validation_are_never_trained_on(page):
    rng = random.Random(0)
    train = {page.draw(rng, held_out=False) for _ in range(2000)}
    held_out = {page.draw(rng, held_out=True) for _ in range(500)}
    assert not train & held_out
    assert len(held_out) > 50


def test_the_page_is_one_page(page):
    with open(page.__file__) as file:
        assert sum(1 for _ in file) < 400
