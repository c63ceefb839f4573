"""From recipe and command line to a typed configuration, or to one line that says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from mcore_rl.algorithms.advantages import ADVANTAGES, AlgorithmConfig
from mcore_rl.algorithms.losses import POLICY_LOSSES
from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line, to_yaml
from mcore_rl.config.run import ActorConfig, RunConfig, SftRunConfig
from mcore_rl.errors import UserError
from mcore_rl.megatron.config import LoraConfig
from mcore_rl.options import with_options

REPOSITORY = Path(__file__).parents[3]
RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
ON_BASE = "defaults: [base, _self_]\n"


def compose(*argv: str, root: type[Any] = RunConfig) -> Any:
    return compose_config(root, parse_command_line("train", "", argv))


def refusal(*argv: str, root: type[Any] = RunConfig) -> str:
    """Return the one line with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        compose(*argv, root=root)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def recipe(tmp_path):
    """Return a function (text) -> arguments that choose a recipe with that text."""

    def write(text: str) -> list[str]:
        (tmp_path / "mine.yaml").write_text(text, "latin-1")
        return ["--config-dir", str(tmp_path), "--config-name", "mine"]

    return write


def test_no_recipe_has_the_name_of_what_is_composed_without_a_file():
    """Hydra looks for files first: one would stand in for the typed tree, or for a replayed run."""
    assert not {"base", "replay"} & set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_to_what_its_file_says(name):
    root = SftRunConfig if "sft" in name.split("_") else RunConfig
    config = compose("--config-name", name, root=root)
    assert isinstance(config, root)
    said = OmegaConf.load(REPOSITORY / "configs" / f"{name}.yaml")
    assert isinstance(said, DictConfig)
    del said["defaults"]
    resolved = OmegaConf.create(to_yaml(config))
    assert OmegaConf.merge(resolved, said) == resolved
    assert said


def test_the_recipes_choose_what_their_names_say():
    chosen = {
        name: (config.algorithm.adv_estimator, config.actor.policy_loss.loss_mode)
        for name in ("dapo", "dr_grpo", "gmpo", "gpg", "grpo")
        for config in [compose("--config-name", name)]
    }
    assert chosen == {
        "dapo": ("grpo", "vanilla"),
        "dr_grpo": ("grpo", "vanilla"),
        "gmpo": ("grpo", "geo_mean"),
        "gpg": ("gpg", "gpg"),
        "grpo": ("grpo", "vanilla"),
    }


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("algorithm.adv_estimator", name) for name in ADVANTAGES),
        *(("actor.policy_loss.loss_mode", name) for name in POLICY_LOSSES),
    ],
)
def test_every_estimator_and_loss_is_chosen_by_its_key(key, name):
    config = compose(f"{key}={name}", "rollout.n=4", "model.path=m", "data.train_files=d")
    check_run(config)
    assert name in (config.algorithm.adv_estimator, config.actor.policy_loss.loss_mode)


def test_without_a_recipe_every_value_is_the_default_of_its_field():
    assert compose() == RunConfig(
        actor=ActorConfig.of("vanilla"),
        algorithm=AlgorithmConfig.of("grpo"),
        trainer=type(RunConfig().trainer)(default_local_dir="outputs/mcore_rl/default"),
    )
    assert isinstance(compose(root=SftRunConfig), SftRunConfig)


def test_an_override_wins_over_the_recipe():
    assert compose("-cn", "gmpo").actor.clip_ratio_low == 0.4
    assert compose("-cn", "gmpo", "actor.clip_ratio_low=0.3").actor.clip_ratio_low == 0.3


def test_the_run_folder_follows_project_and_experiment():
    config = compose("trainer.project_name=p", "trainer.experiment_name=e")
    assert config.trainer.default_local_dir == "outputs/p/e"


def test_the_prefix_of_other_trainers_equals_its_absence():
    keys = ["actor.optim.lr=3e-5", "model.path=m", "rollout.n=4", "actor.clip_ratio_low=0.1"]
    prefixed = [f"actor_rollout_ref.{key}" for key in keys]
    assert compose(*prefixed) == compose(*keys) != compose()
    extra = "actor.megatron.override_transformer_config.moe_aux_loss_coeff=0.1"
    assert compose(f"+actor_rollout_ref.{extra}") == compose(f"+{extra}")


@pytest.mark.parametrize("sign", ["+", "++"])
def test_hydra_s_signs_equal_their_absence(sign):
    assert compose(f"{sign}rollout.n=2") == compose("rollout.n=2") != compose()


def test_the_last_of_several_values_of_a_key_counts():
    assert compose("rollout.n=2", "actor_rollout_ref.rollout.n=3").rollout.n == 3


def test_the_prefix_inside_a_value_stays():
    assert compose("model.path=actor_rollout_ref.m").model.path == "actor_rollout_ref.m"


@pytest.mark.parametrize(
    ("override", "closest"),
    [
        ("actor.optim.lrr=1", "actor.optim.lr"),
        ("actor_rollout_ref.rollout.temperatur=1", "rollout.temperature"),
        ("trainer.total_epoch=3", "trainer.total_epochs"),
        ("data.train_file=x", "data.train_files"),
        ("algorithm.kl_ctrl.coef=1", "algorithm.kl_ctrl.kl_coef"),
        ("+rollout.nn=1", "rollout.n"),
    ],
)
def test_a_misspelt_key_names_itself_and_the_closest(override, closest):
    key = override.split("=")[0].removeprefix("+").removeprefix("actor_rollout_ref.")
    assert refusal(override) == f"{key}: there is no such key. Did you mean {closest!r}?"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("actor.optim.lr=abc", "actor.optim.lr: Value 'abc' of type 'str'"),
        ("trainer.n_gpus_per_node=2.5", "trainer.n_gpus_per_node: Value '2.5'"),
        ("trainer.logger=console", "trainer.logger: "),
        ("trainer.total_epochs=null", "trainer.total_epochs: "),
        ("actor=vanilla", "actor: Invalid type assigned: str"),
        ("actor.optim=3", "actor.optim: Invalid type assigned: int"),
        ("trainer.logger={a: 1}", "trainer.logger: Invalid type assigned: dict"),
        ("data.train_files=3", "data.train_files=3 must be a path or a list of paths."),
        ("rollout.n=0", "rollout.n=0 must be at least 1."),
        ("rollout.sleep_level=3", "rollout.sleep_level=3 must be 0, 1 or 2."),
        ("trainer.resume_mode=resume_path", "trainer.resume_from_path=None does not fit"),
        ("trainer.resume_from_path=a", "trainer.resume_from_path='a' does not fit"),
        ("trainer.best_ckpt_metric=m", "trainer.best_ckpt_metric='m' has no effect"),
        ("trainer.best_ckpt_mode=min", "trainer.best_ckpt_mode='min' has no effect"),
        ("trainer.default_local_dir=${nowhere}", "trainer.default_local_dir: Interpolation key"),
        ("~actor.optim.lr", "'~actor.optim.lr' changes which keys there are."),
        ("rollout@actor=vllm", "'rollout@actor=vllm' changes which keys there are."),
        ("rollout.n=2,4", "'rollout.n=2,4' is a sweep."),
        ("actor.entropy_coeff=nan", "actor.entropy_coeff=nan is not finite."),
        ("actor.optim.betas=[0.9,0.999,inf]", "actor.optim.betas="),
        (
            "rollout.engine_kwargs={a: [1.0, -inf]}",
            "rollout.engine_kwargs.a.1=-inf is not finite.",
        ),
        ("model.path", "'model.path' is not of the form key=value"),
        ("model.path=a=b", "'model.path=a=b' is not of the form key=value"),
    ],
)
def test_a_value_that_cannot_be_taken_names_its_key(override, expected):
    assert refusal(override).startswith(expected)


def test_a_choice_that_is_not_registered_lists_what_is():
    text = refusal("algorithm.adv_estimator=grop")
    assert text.startswith("algorithm.adv_estimator='grop': there is no such advantage estimator.")
    assert "Did you mean 'grpo'?" in text
    assert "gpg" in text
    assert "geo_mean" in refusal("actor.policy_loss.loss_mode=geomean")


def test_lora_is_composed_under_the_keys_that_verl_has():
    on = compose("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=32")
    assert on.model.lora == LoraConfig(rank=8, alpha=32, target_modules=("all-linear",))
    assert on.model.lora.scale == 4.0
    chosen = compose("model.lora_rank=8", "model.target_modules=[o_proj,q_proj]")
    assert chosen.model.lora.target_modules == ("o_proj", "q_proj")
    assert compose("model.lora_rank=0").model.lora is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.lora_rank=-1"], "model.lora_rank=-1 must be >= 0."),
        (["model.lora_rank=8", "model.lora_alpha=0"], "model.lora_alpha=0 must be > 0."),
        (["model.lora_alpha=32"], "model.lora_alpha=32 has no effect without adapters."),
        (["model.target_modules=[o_proj]"], "model.target_modules=['o_proj'] has no effect"),
        (
            ["model.lora_rank=8", "model.target_modules=o_proj"],
            "model.target_modules='o_proj' is neither all-linear nor a list of names.",
        ),
        (
            ["model.lora_rank=8", "model.target_modules=[]"],
            "model.target_modules=[] is neither all-linear nor a list of names.",
        ),
    ],
)
def test_what_adapters_cannot_be_is_refused(overrides, expected):
    assert refusal(*overrides).startswith(expected)


@pytest.mark.parametrize(
    "override", ["rollout.n=2,4", "data.train_files=a,b", "rollout.n=range(3)"]
)
def test_a_sweep_is_refused(override):
    text = refusal(override)
    assert text == f"{override!r} is a sweep. Quote the value if the commas belong to it."


def test_commas_are_taken_when_quoted_and_several_files_as_a_list():
    assert compose("model.path='a,b'").model.path == "a,b"
    assert compose("data.train_files=[a,b]").data.train_files == ["a", "b"]


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_keys_below_an_untyped_dictionary_need_no_plus(plus):
    config = compose(
        f"{plus}rollout.engine_kwargs.block_size=32",
        f"{plus}actor.megatron.override_transformer_config.moe_aux_loss_coeff=0.1",
        f"{plus}data.apply_chat_template_kwargs.enable_thinking=false",
    )
    assert config.rollout.engine_kwargs == {"block_size": 32}
    assert config.actor.megatron.override_transformer_config == {"moe_aux_loss_coeff": 0.1}
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}


def test_an_untyped_dictionary_takes_a_whole_one():
    config = compose("rollout.engine_kwargs={block_size: 32, nested: {a: 1}}")
    assert config.rollout.engine_kwargs == {"block_size": 32, "nested": {"a": 1}}


def test_an_unknown_recipe_names_the_closest_and_lists_all():
    text = refusal("--config-name", "gmpoo")
    assert "--config-name gmpoo: there is no such recipe" in text
    assert "Did you mean 'gmpo'?" in text
    for name in RECIPES:
        assert name in text


def test_a_missing_folder_of_recipes_is_named(tmp_path):
    text = refusal("--config-dir", str(tmp_path / "none"), "--config-name", "gmpo")
    assert text == f"--config-dir {tmp_path / 'none'}: there is no such folder."


def test_a_recipe_of_ones_own_is_read(recipe):
    argv = recipe(ON_BASE + "rollout:\n  n: 3\n  engine_kwargs: {block_size: 32}\n")
    config = compose(*argv)
    assert config.rollout.n == 3
    assert config.rollout.engine_kwargs == {"block_size": 32}
    name_with_suffix = [*argv[:-1], "mine.yaml"]
    assert compose(*name_with_suffix) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ON_BASE + "rollout:\n  nn: 3\n", "rollout.nn: Key 'nn' not in 'RolloutConfig'."),
        (ON_BASE + "rollout:\n  n: abc\n", "rollout.n: Value 'abc' of type 'str'"),
        (ON_BASE + "rollout:\n  n: 0\n", "rollout.n=0 must be at least 1."),
        (ON_BASE + "rollout: 3\n", "rollout: Invalid type assigned: int."),
        (ON_BASE + "rolout:\n  n: 3\n", "rolout: Key 'rolout' not in 'RunConfig'."),
        (ON_BASE + "rollout: [\n", "--config-name mine: while parsing"),
        (ON_BASE + "# \xff\n", "--config-name mine: 'utf-8' codec can't decode byte 0xff"),
        ("defaults: [bsae]\n", "In 'mine': Could not load 'bsae'."),
        ("rollout:\n  n: 3\n", "--config-name mine: the recipe does not build on the typed tree."),
        ("", "--config-name mine: the recipe does not build on the typed tree."),
        ("- rollout\n", "primary config 'mine' must be a DictConfig"),
    ],
)
def test_a_broken_recipe_is_refused_with_key_or_file(recipe, text, expected):
    assert refusal(*recipe(text), "model.path=m").startswith(expected)


def test_a_misspelt_key_of_a_recipe_names_the_closest(recipe):
    text = refusal(*recipe(ON_BASE + "trainer:\n  total_epoch: 3\n"))
    assert "trainer.total_epoch: " in text
    assert "Did you mean 'trainer.total_epochs'?" in text


def test_reinforcement_learning_keys_are_unknown_to_supervised_fine_tuning():
    assert refusal("rollout.n=2", root=SftRunConfig).startswith("rollout.n: there is no such key.")


PLUGIN = """
from dataclasses import dataclass, field
from mcore_rl.algorithms.advantages import ADVANTAGES
from mcore_rl.algorithms.losses import POLICY_LOSSES, TokenLoss
from mcore_rl.errors import require

@dataclass(kw_only=True)
class MyConfig:
    strength: float = 0.5
    bounds: list[float] = field(default_factory=lambda: [1.0, 2.0])

    def __post_init__(self):
        require(self.strength > 0, "actor.strength", self.strength, "must be > 0")

@POLICY_LOSSES.register("my_own", config=MyConfig)
def mine(inputs, cfg):
    return TokenLoss(-cfg.strength * inputs.advantages_T * inputs.logprobs_T, {})

@dataclass(kw_only=True)
class MyEstimatorConfig:
    gamma: float = 0.75
    shift: int = 0

@ADVANTAGES.register("my_estimator", config=MyEstimatorConfig)
def my_estimator(inputs, cfg):
    return inputs.segments.expand(inputs.rewards_N - cfg.shift)
"""


def run_train(folder: Path, *argv: str, plugins: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mcore_rl.train", *argv],
        cwd=folder,
        env=os.environ | {"MCORE_RL_PLUGINS": plugins},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.starts_processes
def test_a_plugin_s_loss_can_be_chosen_and_the_printed_configuration_composes_again(
    tmp_path, recipe
):
    """The command, `--cfg job` and all: what it prints, under a defaults list, is a recipe."""
    (tmp_path / "my_loss.py").write_text(PLUGIN)
    argv = ["actor.policy_loss.loss_mode=my_own", "-cn", "grpo", "rollout.n=5", "--cfg", "job"]
    done = run_train(tmp_path, *argv, plugins="my_loss")
    assert done.returncode == 0, done.stderr
    assert "loss_mode: my_own" in done.stdout
    printed = OmegaConf.create(done.stdout)
    printed.actor.policy_loss.loss_mode = "vanilla"  # my_own is registered in that process alone
    assert (printed.actor.pop("strength"), printed.actor.pop("bounds")) == (0.5, [1.0, 2.0])
    text = OmegaConf.to_yaml(printed)
    assert compose(*recipe(ON_BASE + text)) == compose("-cn", "grpo", "rollout.n=5")


@pytest.fixture
def plugin(monkeypatch):
    """Register what PLUGIN does, for one test."""
    for registry in (ADVANTAGES, POLICY_LOSSES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    exec(PLUGIN, {"__name__": __name__})


OWN_LOSS = "actor.policy_loss.loss_mode=my_own"
OWN_ESTIMATOR = "algorithm.adv_estimator=my_estimator"


@pytest.mark.usefixtures("plugin")
def test_a_plugin_has_options_on_the_command_line():
    config = compose(OWN_LOSS, "actor.strength=2", "actor_rollout_ref.actor.bounds=[0,3]")
    assert (config.actor.options.strength, config.actor.options.bounds) == (2.0, [0.0, 3.0])
    printed = OmegaConf.create(to_yaml(config))
    assert (printed.actor.strength, printed.actor.bounds) == (2.0, [0.0, 3.0])
    assert "strength" not in to_yaml(compose())
    # Two estimators may have an option of one name, each with its own default.
    for argv, expected in (([], (0.75, 0)), (["algorithm.gamma=0.5"], (0.5, 0))):
        options = compose(OWN_ESTIMATOR, *argv).algorithm.options
        assert (options.gamma, options.shift) == expected


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [OWN_LOSS, "actor.strenght=2"],
            "actor.strenght: there is no such key. Did you mean 'actor.strength'?",
        ),
        ([OWN_LOSS, "actor.strength=abc"], "actor.strength: Value 'abc' of type 'str'"),
        ([OWN_LOSS, "actor.strength=-1"], "actor.strength=-1.0 must be > 0."),
        ([OWN_LOSS, "actor.bounds=[inf]"], "actor.bounds.0=inf is not finite."),
        ([OWN_LOSS, "actor.tau_pos=2"], "actor.tau_pos=2 is not read with actor.policy_loss"),
        (["actor.strength=2"], "actor.strength=2 is not read with actor.policy_loss.loss_mode=va"),
        (["algorithm.shift=2"], "algorithm.shift=2 is not read with algorithm.adv_estimator=grpo."),
        ([OWN_ESTIMATOR, "algorithm.shift=1.5"], "algorithm.shift: Value '1.5' of type 'float'"),
    ],
)
def test_an_option_of_a_plugin_is_typed_and_refused_when_unread_or_misspelt(argv, expected):
    assert refusal(*argv).startswith(expected)


def test_an_option_with_the_name_of_a_key_of_the_section_is_refused():
    @dataclass(kw_only=True)
    class Greedy:
        grad_clip: float = 2.0

    with pytest.raises(
        UserError, match=r"Greedy\.grad_clip has the name of something that every A"
    ):
        with_options(ActorConfig, Greedy)


def test_an_option_without_a_default_is_refused_at_registration():
    @dataclass(kw_only=True)
    class Demanding:
        strength: float

    with pytest.raises(ValueError, match="the option 'strength' of 'mine' has no default"):
        POLICY_LOSSES.register("mine", config=Demanding)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "actor:\n  tau_pos: 2\n",
            "actor.tau_pos=2 is not read with actor.policy_loss",
        ),
        ("algorithm:\n  gama: 2\n", "algorithm.gama: Key 'gama' not in 'AlgorithmConfig'."),
        (
            "actor:\n  policy_loss: {loss_mode: sapo}\n  tau_pos: x\n",
            "actor.tau_pos: Value 'x' of type 'str'",
        ),
    ],
)
def test_options_of_a_recipe_are_typed_and_refused_alike(recipe, text, expected):
    assert refusal(*recipe(ON_BASE + text)).startswith(expected)


def test_the_printed_configuration_has_the_options_of_what_is_chosen_alone():
    printed = OmegaConf.create(to_yaml(compose("-cn", "gmpo", "actor.clip_ratio_high=0.5")))
    assert (printed.actor.clip_ratio_low, printed.actor.clip_ratio_high) == (0.4, 0.5)
    assert "norm_adv_by_std_in_grpo" in printed.algorithm
    assert not {"tau_pos", "clip_ratio_c"} & printed.actor.keys()
    assert not {"gamma", "gpg_alpha"} & printed.algorithm.keys()


@pytest.mark.starts_processes
def test_a_missing_plugin_is_one_line_and_exit_code_2(tmp_path):
    done = run_train(tmp_path, "--cfg", "job", plugins="no_such_module")
    assert done.returncode == 2
    assert done.stderr == (
        "error: MCORE_RL_PLUGINS names 'no_such_module': No module named 'no_such_module'.\n"
    )
    assert done.stdout == ""
