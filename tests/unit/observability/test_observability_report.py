"""The report shows the numbers of the run folder, draws what was logged and names the rest."""

from __future__ import annotations

import base64
import io
import json
import math
import re

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from mcore_rl.errors import UserError
from mcore_rl.observability.plots import PLOTS, draw_accuracy, to_columns
from mcore_rl.observability.report import summarize, write_report

NUM_STEPS = 5

CONFIG = """
trainer: {experiment_name: <gmpo>}
actor: {policy_loss: {loss_mode: geo_mean}, clip_ratio_low: 0.4}
"""


def make_records():
    records = []
    for step in range(NUM_STEPS):
        record = {
            "step": step,
            "reward/mean": 0.1 + math.sin(step),
            "rollout/response_tokens/mean": 3.0 + step,
            "rollout/response_tokens/min": 1.0,
            "rollout/response_tokens/max": 9.0,
            "actor/ratio/min": 0.25,
            "actor/ratio/max": 1.0 + step,
            "actor/ratio/mean": 1.0,
            "actor/seq_ratio/min": 0.9,
            "actor/seq_ratio/max": 1.1,
            "mismatch/logprob_abs_diff/max": 3e-6 / (step + 1),
            "mismatch/logprob_abs_diff/mean": 0.0,
            "actor/grad_norm": math.nan if step == 2 else 1.0,
            "actor/pg_loss": -0.01 * step,
            "actor/entropy": 1.0,
            "perf/tokens_per_s": 1000.0,
            "perf/engines_busy_frac": 0.5 + 0.01 * step,
            "perf/trainer_busy_frac": 0.4,
            "time/step": 3.0,
            "time/rollout": 1.0,
            "time/train": 1.5,
        }
        if step % 2 == 0:
            record["eval/gsm8k/accuracy"] = step / 10
        records.append(record)
    return records


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run_dir(path):
    write_lines(path / "metrics.jsonl", make_records())
    sample = {"uid": "t:0", "ground_truth": "4", "reward": 1.0, "finish_reason": "stop"}
    write_lines(
        path / "samples.jsonl",
        [
            {"step": 3, "prompt": "old prompt", "response": "0", **sample},
            {
                "step": 4,
                "split": "val",
                "prompt": "2+2=<|im_end|>",
                "response": "4 & more",
                **sample,
            },
        ],
    )
    (path / "config.yaml").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def reported_dir(tmp_path_factory):
    """A run folder with its report; tests only read it."""
    run_dir = make_run_dir(tmp_path_factory.mktemp("run"))
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def page(reported_dir):
    return (reported_dir / "report.html").read_text()


def num_colored_pixels(png):
    """Pixels of a curve's color; text, grid and axes are nearly grey."""
    rgb = imread(io.BytesIO(png), format="png")[..., :3]
    return int((rgb.max(-1) - rgb.min(-1) > 0.4).sum())


def test_every_plot_is_drawn_saved_and_embedded(reported_dir, page):
    embedded = [base64.b64decode(text) for text in re.findall(r"base64,([^\"]+)\"", page)]
    assert len(embedded) == len(PLOTS)
    for plot, png in zip(PLOTS, embedded, strict=True):
        assert num_colored_pixels(png) > 300, plot.name
        assert (reported_dir / "plots" / f"{plot.name}.png").read_bytes() == png
    assert "Not drawn" not in page


def test_a_run_of_one_step_shows_in_every_plot():
    columns = to_columns(make_records()[:1])
    for plot in PLOTS:
        assert num_colored_pixels(plot.to_png(columns)) > 20, plot.name


def test_plots_without_metrics_are_left_out_and_named(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "reward/mean": 0.5}])
    page = write_report(tmp_path).read_text()
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["reward.png"]
    assert "Validation accuracy (needs eval/*/accuracy)" in page
    assert "Gradient norm (needs actor/grad_norm)" in page


def test_summary_numbers_are_those_of_the_file():
    rows = {row.key: row for row in summarize(to_columns(make_records()))}
    rewards = [0.1 + math.sin(step) for step in range(NUM_STEPS)]
    reward = rows["reward/mean"]
    assert (reward.first, reward.last) == (rewards[0], rewards[-1])
    assert (reward.best, reward.best_step) == (rewards[2], 2)  # sin is largest at 2 of 0..4
    accuracy = rows["eval/gsm8k/accuracy"]
    assert (accuracy.first, accuracy.last, accuracy.best_step) == (0.0, 0.4, 4)
    mismatch = rows["mismatch/logprob_abs_diff/max"]
    assert (mismatch.best, mismatch.best_step) == (3e-6 / NUM_STEPS, NUM_STEPS - 1)
    assert rows["actor/pg_loss"].best is None


def test_the_page_shows_the_summary_to_six_digits(page):
    for row in summarize(to_columns(make_records())):
        cells = re.search(rf"<tr><td>{re.escape(row.key)}</td>(.*)</tr>", page)
        assert cells is not None, row.key
        shown = re.findall(r"<td>([^<]*)</td>", cells[1])
        best = "" if row.best is None else f"{row.best:.6g}"
        assert shown[:3] == [f"{row.first:.6g}", f"{row.last:.6g}", best]


def test_a_value_that_is_not_finite_is_never_the_best():
    records = [{"step": step, "reward/mean": x} for step, x in enumerate((math.nan, 0.5, math.inf))]
    (row,) = summarize(to_columns(records))
    assert (row.best, row.best_step) == (0.5, 1)


@pytest.mark.parametrize("trained", ["reward/mean", "sft/loss"])
def test_a_last_validation_counts_as_time_but_not_as_a_step(tmp_path, trained):
    times = [4.0, 3.0, 0.5]
    records = [{"step": step, "time/step": seconds} for step, seconds in enumerate(times)]
    for record in records[:2]:
        record[trained] = 1.0
    write_lines(tmp_path / "metrics.jsonl", records)
    page = write_report(tmp_path).read_text()
    assert "<small>time</small><b>0:00:08</b><small>2 steps of 3.5 s</small>" in page
    numbers = "".join(f"<td>{cell}</td>" for cell in ("time/step", 4, 3, 3, 1))
    assert f"<tr>{numbers}</tr>" in page


def test_a_file_without_a_step_that_trained_shows_no_time_of_steps(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 2, "time/step": 3.0}])
    page = write_report(tmp_path).read_text()
    assert "<small>time</small>" not in page
    assert "<td>time/step</td>" not in page


@pytest.mark.parametrize(
    ("scores", "limits"), [((0.0, 0.5, 1.0), (-0.02, 1.02)), ((-0.8, -0.4, 1.7), None)]
)
def test_every_validation_score_lies_inside_its_picture(scores, limits):
    axes = Figure().subplots()
    key = "eval/gsm8k/accuracy"
    draw_accuracy(axes, to_columns({"step": i, key: x} for i, x in enumerate(scores)), [key])
    low, high = axes.get_ylim()
    assert low < min(scores)
    assert max(scores) < high
    if limits:
        assert (low, high) == limits


def test_validation_accuracy_is_called_what_it_is(page):
    assert "<figcaption>Mean score of the held-out prompts.</figcaption>" in page


def test_the_page_shows_the_last_samples_and_the_settings_escaped(page):
    assert "<title>&lt;gmpo&gt;</title>" in page
    assert "2+2=&lt;|im_end|&gt;" in page
    assert "4 &amp; more" in page
    assert "old prompt" not in page
    assert "<td>val</td><td>t:0</td>" in page
    assert "<td>actor.policy_loss.loss_mode</td><td>geo_mean</td>" in page


def test_missing_samples_and_config_are_named(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "reward/mean": 0.5}])
    page = write_report(tmp_path).read_text()
    assert "The run has no samples.jsonl." in page
    assert "The run has no config.yaml." in page


def test_the_same_run_gives_the_same_bytes(tmp_path, page):
    assert write_report(make_run_dir(tmp_path)).read_text() == page


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: there is no logged step"):
        write_report(tmp_path)


def test_a_stranger_s_folder_gives_away_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "sk-0123456789")
    make_run_dir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "model: {path: '${oc.env:KEY}'}\ntrainer: {experiment_name: '${oc.env:KEY}'}\n"
        "data: {train_files: ['${oc.env:KEY}', '${oc.decode:${oc.env:KEY}}']}\n"
    )
    page = write_report(tmp_path).read_text()
    assert "sk-0123456789" not in page
    assert page.count("${oc.env:KEY}") > 5  # title, table and whole configuration


def test_what_stands_in_a_response_or_a_name_commands_no_terminal(tmp_path):
    """Half of a pair of surrogates in a ground truth too: a JSON file may well hold one."""
    make_run_dir(tmp_path)
    sample = {"step": 4, "uid": "t:0", "response": "\x1b[2J\u202e", "ground_truth": "\ud83d"}
    write_lines(tmp_path / "samples.jsonl", [sample])
    (tmp_path / "config.yaml").write_text('trainer: {experiment_name: "\\e[31m"}')
    page = write_report(tmp_path).read_bytes().decode()
    assert not [c for c in page if c in "\x1b\u202e"]
    assert r"\x1b[2J\u202e" in page
    assert r"<td>\ud83d</td>" in page
    assert r"<h1>\x1b[31m</h1>" in page


@pytest.mark.parametrize(
    ("value", "shown"),
    [("10" * 200, "a int"), ('"high"', "'high'"), ("null", "a NoneType"), ("[1]", "a list")],
)
def test_a_metric_that_is_no_number_is_named(tmp_path, value, shown):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 3, "reward/mean": {value}}}\n')
    with pytest.raises(UserError) as caught:
        write_report(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/metrics.jsonl: reward/mean of step 3 is {shown}, which is no number that can "
        "be drawn. Remove it from the line."
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 0, "a": ' + "[" * 10**5 + "]" * 10**5 + "}",
        '{"step": 1' + "0" * 400 + "}",
        '{"step": 1' + "0" * 5000 + "}",
        '{"step": -1}',
    ],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_line_that_no_run_writes_is_named(tmp_path, name, line):
    make_run_dir(tmp_path)
    (tmp_path / name).write_text(f"{line}\n")
    with pytest.raises(UserError, match=rf"{name}: line 1 is not a JSON object with a step"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**4, "a: ${b", "- 1", "a: b: c", "\x00", "a: !!python/object/apply:os.abort []"],
)
def test_a_configuration_that_is_none_is_named(tmp_path, text):
    make_run_dir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"config\.yaml is not the configuration of a run: "
    ) as said:
        write_report(tmp_path)
    assert "\n" not in str(said.value)


def test_names_with_dollar_signs_and_huge_numbers_are_drawn(tmp_path):
    """A dollar sign begins a formula for matplotlib, and this one is none."""
    record = {"step": 0, "eval/$x_{/accuracy": 0.5, "eval/\ud83d\x1b/accuracy": 0.5}
    record |= {"time/$y^": 1.0, "actor/ratio/$/mean": 1.0, "actor/grad_norm": 1e308}
    write_lines(tmp_path / "metrics.jsonl", [record, record | {"step": 1}])
    assert "eval/$x_{/accuracy" in write_report(tmp_path).read_text()


def test_a_link_in_a_stranger_s_folder_is_not_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    make_run_dir(run_dir)
    (run_dir / "plots").mkdir()
    names = ["report.html", "report.html.partial", "plots/reward.png", "plots/reward.png.partial"]
    for name in names:
        (run_dir / name).symlink_to(mine)
    write_report(run_dir)
    assert mine.read_text() == "mine"
    assert not (run_dir / "report.html").is_symlink()
