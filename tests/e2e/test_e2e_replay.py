"""A run replayed with other code: where the two part is named."""

from __future__ import annotations

import pytest

from tests.e2e import commands

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

LOSS = '''"""Policy gradient, times a number."""

from dataclasses import dataclass

from mcore_rl.algorithms.losses import POLICY_LOSSES, PolicyLossInputs, TokenLoss
from mcore_rl.algorithms.ratio import probability_ratio


@dataclass(kw_only=True, slots=True)
class OwnConfig:
    """No options."""


@POLICY_LOSSES.register("own", config=OwnConfig)
def own(inputs: PolicyLossInputs, cfg: OwnConfig) -> TokenLoss:
    return TokenLoss(-1.0 * inputs.advantages_T * probability_ratio(inputs.log_ratio_T), {})
'''


def test_one_changed_character_of_a_loss_is_named_at_its_first_step_and_tensor(files, tmp_path):
    run_dir, loss = tmp_path / "run", tmp_path / "own_loss.py"
    loss.write_text(LOSS)
    environment = {"MCORE_RL_PLUGINS": "own_loss", "PYTHONPATH": str(tmp_path)}
    argv = files.argv(
        run_dir,
        "actor.policy_loss.loss_mode=own",
        "actor.megatron.expert_model_parallel_size=1",
        "rollout.name=fake",
        "rollout.logprob_tolerance=1000",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=2",
    )
    argv = [*argv[2:], "algorithm.adv_estimator=grpo"]  # without the recipe, whose loss has options
    done = commands.run(*argv, environment=environment)
    assert done.returncode == 0, done.stderr
    loss.write_text(LOSS.replace("-1.0", "-1.5"))
    other = commands.run(str(run_dir), module="mcore_rl.replay", environment=environment)
    assert other.returncode == 1, other.stdout + other.stderr
    metric, tensor = other.stdout.splitlines()[-2:]
    assert metric.startswith("differs step 0: actor/"), metric
    # The update of step 0 gives the weights that step 1 begins with.
    assert tensor.startswith("differs weights 1: model.embed_tokens.weight is float32["), tensor
    again = commands.run(
        *(str(run_dir), "--against", str(run_dir / "replays" / "1"), "--out", str(tmp_path / "b")),
        module="mcore_rl.replay",
        environment=environment,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "equal   3 steps: " in again.stdout
