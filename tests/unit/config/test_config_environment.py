"""What comes from the environment is used, and written nowhere."""

import pytest
from omegaconf import OmegaConf

from mcore_rl.config.compose import compose_config, parse_command_line, to_yaml
from mcore_rl.config.run import RunConfig, SftRunConfig
from mcore_rl.errors import UserError

SECRET = "sk-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("KEY", SECRET)
    monkeypatch.setenv("RATE", "0.5")
    monkeypatch.delenv("ABSENT", raising=False)


def compose(*argv):
    argv = ("model.path=m", "data.train_files=d", "custom_reward_function.path=r.py", *argv)
    return compose_config(RunConfig, parse_command_line("train", "", argv))


KWARGS = "custom_reward_function.reward_kwargs"
WAYS = {
    "alone": (f"{KWARGS}.key=${{oc.env:KEY}}", "key", SECRET, "${oc.env:KEY}"),
    "within a text": (f"{KWARGS}.key=a-${{oc.env:KEY}}", "key", f"a-{SECRET}", "a-${oc.env:KEY}"),
    "with a default": (
        f"{KWARGS}.key=${{oc.env:ABSENT,none}}",
        "key",
        "none",
        "${oc.env:ABSENT,none}",
    ),
    "decoded": (
        f"{KWARGS}.key='${{oc.decode:${{oc.env:RATE}}}}'",
        "key",
        0.5,
        "${oc.decode:${oc.env:RATE}}",
    ),
    "in a list": (f"{KWARGS}.key=[1,'${{oc.env:KEY}}']", "key", [1, SECRET], [1, "${oc.env:KEY}"]),
    "in a tree": (
        f"{KWARGS}.key={{a: [{{b: '${{oc.env:KEY}}'}}]}}",
        "key",
        {"a": [{"b": SECRET}]},
        {"a": [{"b": "${oc.env:KEY}"}]},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_run_gets_the_value_and_the_file_the_reference(way):
    override, key, value, written = WAYS[way]
    config = compose(override)
    assert config.custom_reward_function.reward_kwargs[key] == value
    text = to_yaml(config)
    assert SECRET not in text
    loaded = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(loaded, dict)
    assert loaded["custom_reward_function"]["reward_kwargs"][key] == written


def test_what_leads_to_the_environment_by_another_key_stays_a_reference():
    text = to_yaml(compose(f"{KWARGS}.a=${{oc.env:KEY}}", f"{KWARGS}.b=x${{{KWARGS}.a}}"))
    assert SECRET not in text
    assert f"b: x${{{KWARGS}.a}}" in text


def test_a_tree_taken_over_from_another_key_keeps_its_references():
    text = to_yaml(compose(f"{KWARGS}.a={{k: '${{oc.env:KEY}}'}}", f"{KWARGS}.b=${{{KWARGS}.a}}"))
    assert SECRET not in text
    assert text.count("k: ${oc.env:KEY}") == 2


def test_typed_keys_take_references_too():
    config = compose("actor.optim.lr=${oc.env:RATE}", "model.path=/m/${oc.env:KEY}")
    assert (config.actor.optim.lr, config.model.path) == (0.5, f"/m/{SECRET}")
    assert "lr: ${oc.env:RATE}\n" in to_yaml(config)
    assert "path: /m/${oc.env:KEY}\n" in to_yaml(config)


@pytest.mark.parametrize("root", [RunConfig, SftRunConfig])
def test_all_else_is_written_resolved(root):
    argv = ("model.path=m", "data.train_files=d", "trainer.experiment_name=e")
    config = compose_config(root, parse_command_line("train", "", argv))
    resolved = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
    assert to_yaml(config) == resolved
    assert "${" not in resolved


def test_the_file_says_the_same_again_when_it_is_composed_again(tmp_path):
    """It is a recipe: the references in it are followed."""
    config = compose(f"{KWARGS}.key=${{oc.env:KEY}}", "actor.optim.lr=${oc.env:RATE}")
    (tmp_path / "again.yaml").write_text("defaults: [base, _self_]\n" + to_yaml(config))
    argv = ("--config-dir", str(tmp_path), "--config-name", "again")
    again = compose_config(RunConfig, parse_command_line("train", "", argv))
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("actor.optim.lr=${oc.env:KEY}", "'${oc.env:KEY}' of type 'str' could not be converted"),
        ("algorithm.adv_estimator=${oc.env:KEY}", "adv_estimator='${oc.env:KEY}'"),
        ("actor.loss_agg_mode=x${oc.env:KEY}", "loss_agg_mode='x${oc.env:KEY}' is not one of"),
        ("custom_reward_function.name=${oc.env:ABSENT}", "'ABSENT' not found"),
    ],
)
def test_a_refusal_names_the_reference_and_not_the_value(override, said):
    with pytest.raises(UserError) as caught:
        compose(override)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def test_the_environment_is_read_again_afterwards():
    compose(f"{KWARGS}.key=${{oc.env:KEY}}")
    assert OmegaConf.create({"a": "${oc.env:KEY}"}).a == SECRET
