"""The quickstart's script as `make quickstart` of the README calls it: every command that it starts
composes, with the arguments where they belong."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mcore_rl.config.checks import check_sft
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import SftRunConfig
from tests.unit.examples.shell_commands import composed, run_script

ROOT = Path(__file__).parents[3]
COMMANDS = dict.fromkeys(
    re.sub(r"\s+#.*", "", line)
    for line in re.findall(r"^make quickstart.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
)
"""Those of the README, each once."""


def test_the_readme_has_the_commands():
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.starts_processes
def test_what_make_calls_trains_with_the_arguments(tmp_path, command):
    shown = subprocess.run(
        ["bash", "-c", f"{command} --dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = (line for line in shown.splitlines() if "quickstart/run.sh" in line)
    script, *argv = line.split("quickstart/run.sh")[1].split() or [""]
    argv = [script, *argv] if script else []
    out = tmp_path / "out"
    ended = run_script(
        tmp_path,
        ROOT / "examples" / "quickstart" / "run.sh",
        *argv,
        stand_ins="python",
        OUT=str(out),
    )
    assert ended.exit_code == 0, ended.stderr
    # The stand-in prints no configuration, so the run folder that is checked is "".
    model, data, sft, train, shown_again, check, *_ = ended.commands
    assert model[1:] == ["examples/quickstart/make_model.py", "--out", f"{out}/base"]
    assert data[1:] == ["examples/quickstart/make_data.py", "--out", f"{out}/data"]
    line = parse_command_line("sft", "", sft[sft.index("mcore_rl.sft") + 1 :])
    warm_start = compose_config(SftRunConfig, line)
    check_sft(warm_start)
    cfg = composed(train)
    assert cfg.model.path == f"{warm_start.trainer.default_local_dir}/hf_model"
    assert shown_again == [*train, "--cfg", "job"]
    assert check[1] == "examples/quickstart/check_model.py"
    name = cfg.trainer.experiment_name
    assert name == f"{cfg.algorithm.adv_estimator}_{cfg.actor.policy_loss.loss_mode}"
    assert cfg.trainer.default_local_dir == f"{out}/{name}"
    for text in argv:
        key, _, value = text.partition("=")
        found = cfg
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
