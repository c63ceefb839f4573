"""Numbers of a section: the last that is taken, and the first that is refused by its key."""

import pytest

from mcore_rl.config.run import (
    ActorConfig,
    CriticConfig,
    ModelConfig,
    TrainerConfig,
)
from mcore_rl.data.prompts import DataConfig
from mcore_rl.errors import UserError
from mcore_rl.megatron.config import MegatronConfig, OptimConfig

ADAPTERS = {"lora_rank": 8}
COSINE = {"lr_decay_style": "cosine", "lr": 1e-3}
PLAN = {"dry_run": True}

# (section, its class, key, taken, refused, rule, what else is set)
LIMITS = [
    ("trainer", TrainerConfig, "total_epochs", 1, 0, "must be at least 1", {}),
    ("trainer", TrainerConfig, "total_training_steps", 1, 0, "must be at least 1", {}),
    ("trainer", TrainerConfig, "n_gpus_per_node", 1, 0, "must be at least 1", {}),
    ("trainer", TrainerConfig, "n_gpus_per_node", 128, 129, "is more than 128", {}),
    ("trainer", TrainerConfig, "nnodes", 1, 0, "must be at least 1", {}),
    ("trainer", TrainerConfig, "critic_warmup", 0, -1, "must be at least 0", {}),
    ("trainer", TrainerConfig, "test_freq", 1, 0, "must be -1 or at least 1", {}),
    ("trainer", TrainerConfig, "test_freq", -1, -2, "must be -1 or at least 1", {}),
    ("trainer", TrainerConfig, "save_freq", 1, 0, "must be -1 or at least 1", {}),
    ("trainer", TrainerConfig, "save_freq", -1, -2, "must be -1 or at least 1", {}),
    ("trainer", TrainerConfig, "max_ckpt_to_keep", 1, 0, "must be at least 1", {}),
    ("trainer", TrainerConfig, "log_val_generations", 0, -1, "must be >= 0", {}),
    ("trainer", TrainerConfig, "device_memory_gib", 0.5, 0.0, "must be > 0", PLAN),
    ("model", ModelConfig, "lora_rank", 1, -1, "must be >= 0", {}),
    ("model", ModelConfig, "lora_alpha", 1, 0, "must be > 0", ADAPTERS),
    *(
        (section, kind, key, taken, refused, rule, {})
        for section, kind in (("actor", ActorConfig), ("critic", CriticConfig))
        for key, taken, refused, rule in (
            ("ppo_mini_batch_size", 1, 0, "must be at least 1"),
            ("ppo_epochs", 1, 0, "must be at least 1"),
            ("ppo_micro_batch_size_per_gpu", 1, 0, "must be at least 1"),
            ("ppo_max_token_len_per_gpu", 1, 0, "must be at least 1"),
            ("grad_clip", 0.0, -0.5, "must be >= 0"),
        )
    ),
    ("critic", CriticConfig, "cliprange_value", 0.25, 0.0, "must be > 0", {}),
    ("actor", ActorConfig, "kl_loss_coef", 0.0, -0.5, "must be >= 0", {"use_kl_loss": True}),
    ("actor.megatron", MegatronConfig, "context_parallel_size", 1, 0, "must be at least 1", {}),
    ("actor.optim", OptimConfig, "lr", 0.5, 0.0, "must be > 0", {}),
    ("actor.optim", OptimConfig, "min_lr", 1e-3, 2e-3, "must lie between 0 and ", COSINE),
    ("actor.optim", OptimConfig, "min_lr", 0.0, -0.5, "must lie between 0 and ", COSINE),
    ("actor.optim", OptimConfig, "lr_decay_steps", 1, 0, "must be >= 1", COSINE),
    ("actor.optim", OptimConfig, "lr_warmup_steps", 0, -1, "must be >= 0", {}),
    ("actor.optim", OptimConfig, "weight_decay", 0.0, -0.5, "must be >= 0", {}),
    ("actor.optim", OptimConfig, "eps", 0.5, 0.0, "must be > 0", {}),
    *(
        ("data", DataConfig, key, 1, 0, "must be > 0", {})
        for key in (
            "train_batch_size",
            "gen_batch_size",
            "val_batch_size",
            "max_prompt_length",
            "max_response_length",
        )
    ),
    *(
        ("data", DataConfig, key, taken, refused, "must be -1 or at least 1", {})
        for key in ("train_max_samples", "val_max_samples")
        for taken, refused in ((1, 0), (-1, -2))
    ),
]


@pytest.mark.parametrize(("section", "kind", "key", "taken", "refused", "rule", "others"), LIMITS)
def test_a_number_is_taken_up_to_its_limit_and_refused_beyond(
    section, kind, key, taken, refused, rule, others
):
    assert getattr(kind(**others, **{key: taken}), key) == taken
    with pytest.raises(UserError) as caught:
        kind(**others, **{key: refused})
    assert str(caught.value).startswith(f"{section}.{key}={refused} {rule}")


# (key, value, rule, what makes it one that is read)
UNREAD = [
    ("device_memory_gib", 40.0, "is not read without trainer.dry_run=true", PLAN),
    ("best_ckpt_metric", "actor/loss", "has no effect: every", {"max_ckpt_to_keep": 1}),
    (
        "best_ckpt_mode",
        "min",
        "has no effect without trainer.best_ckpt_metric",
        {"best_ckpt_metric": "actor/loss", "max_ckpt_to_keep": 1},
    ),
    ("resume_from_path", "f", "does not fit trainer.resume_mode=", {"resume_mode": "resume_path"}),
]


@pytest.mark.parametrize(("key", "value", "rule", "others"), UNREAD)
def test_what_the_trainer_would_not_read_is_refused(key, value, rule, others):
    assert getattr(TrainerConfig(**others, **{key: value}), key) == value
    with pytest.raises(UserError) as caught:
        TrainerConfig(**{key: value})
    assert str(caught.value).startswith(f"trainer.{key}={value!r} {rule}")


def test_a_path_to_resume_from_is_asked_for():
    with pytest.raises(UserError, match=r"resume_from_path=None does not fit .*=resume_path"):
        TrainerConfig(resume_mode="resume_path")


@pytest.mark.parametrize("section", [ActorConfig, CriticConfig])
def test_sequences_of_a_micro_batch_are_counted_or_its_tokens(section):
    by_sequences = {"ppo_micro_batch_size_per_gpu": 2}
    for options in (by_sequences, by_sequences | {"use_dynamic_bsz": False}):
        assert section(**options).cut_over(1).capacity == 2
    assert section(use_dynamic_bsz=True).cut_over(1).capacity == 16384
    with pytest.raises(UserError, match=r"per_gpu=2 has no effect with .*use_dynamic_bsz=true"):
        section(**by_sequences, use_dynamic_bsz=True)
    with pytest.raises(UserError, match=r"use_dynamic_bsz=False needs .*micro_batch_size_per_gpu"):
        section(use_dynamic_bsz=False)


def test_a_run_validates_first_trains_and_exports_its_model_unless_told_otherwise():
    trainer = TrainerConfig()
    assert trainer.val_before_train
    assert trainer.export_hf_model
    assert not (trainer.val_only or trainer.dry_run or trainer.async_save)
