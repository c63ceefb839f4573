"""How many steps the epochs of a run have, and which generation config is read."""

from __future__ import annotations

import pytest

from mcore_rl.config.run import TrainerConfig
from mcore_rl.data.prompts import DataConfig, ItemStream
from mcore_rl.errors import UserError
from mcore_rl.run.inputs import count_steps, read_generation_config


@pytest.mark.parametrize(
    ("num_rows", "size", "drawn", "epochs", "steps"),
    [
        (10, 3, None, 2, 6),
        (36, 4, 12, 1, 3),  # not 9: a step draws three times what it trains on
        (40, 4, 12, 2, 6),  # the last 4 rows of an epoch are not drawn
        (40, 8, 4, 1, 5),  # two draws fill a step at best
        (40, 8, 5, 1, 4),  # eight draws of 5, two to a step
        (11, 10, 6, 3, 1),  # one draw of 6 in an epoch: a step takes two epochs
    ],
)
def test_a_step_counts_as_the_prompts_that_it_draws_at_least(num_rows, size, drawn, epochs, steps):
    data = DataConfig(train_batch_size=size, gen_batch_size=drawn)
    stream = ItemStream(range(num_rows))
    assert count_steps(TrainerConfig(total_epochs=epochs), data, stream) == steps
    asked = TrainerConfig(total_epochs=epochs, total_training_steps=7)
    assert count_steps(asked, data, stream) == 7
    # As many steps whose draws all suffice end in the last of the epochs.
    for _ in range(steps * -(-size // (drawn or size))):
        stream.next(drawn or size)
    assert stream.epoch < epochs


@pytest.mark.parametrize(
    ("size", "drawn", "message"),
    [
        (12, None, r"data\.train_batch_size=12 is more than the 11 rows"),
        (12, 4, r"data\.train_batch_size=12 is more than the 11 rows"),
        (4, 12, r"data\.gen_batch_size=12 is more than the 11 rows"),
        (10, 6, r"trainer\.total_epochs=1 has fewer than the 2 batches of 6 prompts that a step"),
    ],
)
def test_epochs_without_a_step_are_refused(size, drawn, message):
    data = DataConfig(train_batch_size=size, gen_batch_size=drawn)
    with pytest.raises(UserError, match=message):
        count_steps(TrainerConfig(), data, ItemStream(range(11)))


def test_a_generation_config_is_read_where_there_is_one(tmp_path):
    assert read_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    config = read_generation_config(tmp_path)
    assert config is not None
    assert config.eos_token_id == [1, 2]


@pytest.mark.parametrize("text", ['{"eos_token_id": [1, 2', "[]", '{"max_new_tokens": -3}'])
def test_a_damaged_generation_config_is_not_taken_for_none(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json is refused by transformers: "):
        read_generation_config(tmp_path)
