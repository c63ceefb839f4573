"""The report of a long run: small enough to send, complete where it must be, shown by a browser.

Not in `make test-fast`: pages of thousands of samples take seconds, and the browser is a process.
"""

from __future__ import annotations

import itertools
import json

import pytest

from mcore_rl.observability.report.page import write_comparison, write_report
from tests.unit.observability import browser
from tests.unit.observability.report_runs import (
    data_of,
    make_records,
    make_run_dir,
    make_sample,
    write_lines,
)

pytestmark = pytest.mark.starts_processes


def long_sample(index):
    """A sample of 512 logged tokens of 4,000, with the numbers of a policy with a critic."""
    numbers = [round(-0.001 * ((i * 37 + index) % 999), 5) for i in range(512)]
    tokens = {
        "texts": ["word "] * 512,
        "rollout_logprobs": numbers,
        "logprob_diffs": numbers,
        "advantages": {"values": numbers, "counts": [1] * 512},
    }
    texts = {"prompt": "question " * 100, "response": "word " * 4_000}
    return make_sample(0, index=index, num_tokens=4_000, tokens=tokens, **texts)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run of 1,000 steps with 150 metrics, 2 samples of a step and of each validation."""
    run_dir = make_run_dir(tmp_path_factory.mktemp("long"))
    base = make_records()[0]
    more = {f"ledger/discarded/{i}": 12345.678 + i for i in range(150 - len(base))}
    metrics = [
        {key: value * (1 + step % 7 / 9) for key, value in (base | more).items()} | {"step": step}
        for step in range(1_000)
    ]
    write_lines(run_dir / "metrics.jsonl", metrics)
    # What the lines share is made once.
    texts = [
        json.dumps(long_sample(index)).removeprefix('{"step": 0, "split": "train", ')
        for index in range(2)
    ]
    with (run_dir / "samples.jsonl").open("w") as file:
        for step in range(1_000):
            for split in ("val", "train") if step % 50 == 0 else ("train",):
                file.writelines(f'{{"step": {step}, "split": "{split}", {text}\n' for text in texts)
    return run_dir


def test_the_report_of_a_thousand_steps_is_under_5_mb_and_shows_samples_of_every_step(long_run):
    file = write_report(long_run)
    assert file.stat().st_size < 5_000_000
    (run,) = data_of(file.read_text())["runs"]
    samples = run["samples"]
    assert samples["num"] == 2_040
    assert {s["step"] for s in samples["shown"] if s["split"] == "train"} == set(range(1_000))
    assert {s["step"] for s in samples["shown"] if s["split"] == "val"} == set(range(0, 1_000, 50))
    whole = {s["step"] for s in samples["shown"] if s["tokens"]}
    assert {0, 999} <= whole
    assert len(whole) > 25
    gaps = [b - a for a, b in itertools.pairwise(sorted(whole))]
    assert max(gaps) < 100  # spread over the run


def test_two_long_runs_are_under_5_mb_too(long_run, tmp_path):
    (tmp_path / "other").symlink_to(long_run)
    file = write_comparison(long_run, tmp_path / "other")
    assert file.stat().st_size < 5_000_000


def test_a_browser_shows_both_without_a_script_error(long_run, tmp_path):
    (tmp_path / "other").symlink_to(long_run)
    page = write_comparison(long_run, tmp_path / "other")
    first, second = data_of(page.read_text())["runs"]
    assert first["samples"]["shown"] == second["samples"]["shown"]
    num_samples = len(first["samples"]["shown"])
    dom = browser.dom(page, tmp_path)
    assert f'id="count">{num_samples} of {num_samples} samples' in dom
