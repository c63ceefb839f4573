"""kill -9 again and again, and disks that fill up: what is left is resumed to the same numbers.

`pytest -m slow tests/e2e/test_e2e_kill.py --log-level info` does the long version, 20 kills; with
`-rP` it says in which stages they came.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import resource
import statistics
from collections import Counter
from pathlib import Path

import psutil
import pytest

from mcore_rl.loop.checkpoints import CONTROLLER_FILE
from tests.e2e import commands
from tests.e2e.stage_marks import KILL_AT, MARKED, read_stages

logger = logging.getLogger(__name__)

STAGES = ("rollout", "train", "weight_sync", "checkpoint")
POINTER = Path("checkpoints") / "latest_checkpointed_iteration.txt"
# The answers of the fake engine do not depend on the weights; what is trained on them does.
ENGINES = {"fake": ["rollout.name=fake", "rollout.logprob_tolerance=1e9"], "vllm": []}


def argv_of(files, run_dir, engine, *overrides):
    return files.argv(
        run_dir,
        *ENGINES[engine],
        "data.train_batch_size=4",
        "trainer.logger=[stage_marks]",
        "trainer.save_freq=1",
        "trainer.max_ckpt_to_keep=2",
        *overrides,
    )


@pytest.mark.parametrize(
    ("engine", "num_kills", "seed"),
    [
        pytest.param("fake", 4, 0, marks=pytest.mark.timeout(6 * commands.LIMIT_S)),
        pytest.param("fake", 14, 1, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
        pytest.param("vllm", 6, 2, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_numbers(
    files, prepared, tmp_path, engine, num_kills, seed
):
    """Each stage is aimed at as often as the others, at a random moment of it, in the first or
    second step after a start; every other start saves asynchronously, so that its checkpoints are
    being written in the other stages too. How long a stage lasts is that of the run before, on
    which a start may be faster, so the end of the stage is the latest. Metrics have the learning
    rate, checkpoints the moments.
    """
    source = random.Random(seed)
    stages = list(itertools.islice(itertools.cycle(STAGES), num_kills))
    source.shuffle(stages)
    length = f"trainer.total_training_steps={num_kills + 4}"

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = prepared.run(*argv_of(files, whole, engine, length), environment=MARKED)
    assert done.returncode == 0, done.stderr
    marks = read_stages(whole)
    lasted = {
        stage: statistics.median(
            end - begin for (name, begin), (_, end) in itertools.pairwise(marks) if name == stage
        )
        for stage in STAGES
    }

    killed_in = Counter()
    for attempt, stage in enumerate(stages):
        asynchronous = f"trainer.async_save={str(attempt % 2 == 1).lower()}"
        delay = source.random() * lasted[stage]
        kill_at = {KILL_AT: f"{stage} {source.choice((1, 2))} {delay}"}
        argv = argv_of(files, killed, engine, length, asynchronous)
        process = prepared.run(*argv, environment=MARKED | kill_at)
        assert process.returncode == -9
        assert not (killed / "hf_model").exists()
        killed_in[read_stages(killed)[-1][0]] += 1
        killed_in["half-written checkpoint"] += any(killed.glob("checkpoints/*.partial"))
    logger.info("killed %d times: %s", num_kills, dict(killed_in))

    done = prepared.run(*argv_of(files, killed, engine, length), environment=MARKED)
    assert done.returncode == 0, done.stderr
    assert commands.read_metrics(killed) == commands.read_metrics(whole)
    samples = [commands.read_lines(run / "samples.jsonl") for run in (killed, whole)]
    assert samples[0] == samples[1]
    files_of = [commands.hash_files(run / "hf_model") for run in (killed, whole)]
    assert files_of[0] == files_of[1]
    files_of = [commands.hash_files(run / "checkpoints") for run in (killed, whole)]
    assert files_of[0].keys() == files_of[1].keys()  # nothing half-written is left
    # The rest has the path of the folder in it (.metadata) or its size (controller.json).
    for name in files_of[0]:
        if not name.endswith((".metadata", CONTROLLER_FILE)):
            assert files_of[0][name] == files_of[1][name], name


@pytest.mark.timeout(commands.TEST_LIMIT_S)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    files, prepared, tmp_path
):
    """The ranks may write no file of more than 128 KiB once the first checkpoint is there: in the
    background, like all of a checkpoint here. Its tensors are in files of more than 200 KiB;
    the next largest, which lists them, has 60."""
    run_dir = tmp_path / "run"
    argv = argv_of(
        files, run_dir, "fake", "trainer.async_save=true", "trainer.total_training_steps=1000"
    )
    process = prepared.start(*argv, environment=MARKED)
    commands.wait_for(lambda: (run_dir / POINTER).exists(), process)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(ProcessLookupError):  # it has ended in the meantime
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
    done = commands.finish(process)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith("error: [role worker, actor.save, rank ")
    assert ", step " in error
    assert error.endswith("/actor cannot be written: OSError: [Errno 27] File too large")

    step = int((run_dir / POINTER).read_text())
    resumed = prepared.run(*argv, f"trainer.total_training_steps={step + 1}", environment=MARKED)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from {run_dir}/checkpoints/global_step_{step}" in resumed.stderr
