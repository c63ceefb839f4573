"""What the report shows: the numbers of the run folder, and nothing that a stranger's folder could
use. How it looks is in `test_observability_report_browser.py`."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from mcore_rl.errors import UserError
from mcore_rl.observability.columns import Series, to_columns
from mcore_rl.observability.report.curves import (
    MOST_POINTS,
    PLOTS,
    curve,
    plots_of,
    running_mean,
    thinned,
)
from mcore_rl.observability.report.page import write_comparison, write_report
from mcore_rl.observability.report.run import summarize
from mcore_rl.observability.report.timeline import MOST_STEPS, stretches, timeline
from mcore_rl.report import main
from tests.unit.observability.report_runs import (
    NUM_STEPS,
    data_of,
    make_records,
    make_run_dir,
    make_sample,
    reported,
    write_lines,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_run_dir(tmp_path_factory.mktemp("run"))).read_text()


def test_every_plot_has_its_metrics_and_every_metric_its_curve(page):
    data = data_of(page)
    assert [plot["title"] for plot in data["plots"]] == [plot.title for plot in PLOTS]
    assert data["missing"] == []
    (run,) = data["runs"]
    records = make_records()
    for key, drawn in run["columns"].items():
        logged = [(r["step"], r[key]) for r in records if key in r]
        assert drawn["steps"] == [step for step, _ in logged]
        expected = [None if math.isnan(v) else pytest.approx(v, rel=1e-4) for _, v in logged]
        assert drawn["values"] == expected
    assert set(run["columns"]) == {key for r in records for key in r} - {"step"}


def test_plots_without_metrics_are_named_with_what_they_need(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "reward/mean": 0.5}])
    data = data_of(write_report(tmp_path).read_text())
    assert [plot["title"] for plot in data["plots"]] == ["Reward"]
    missing = {plot["title"]: plot["keys"] for plot in data["missing"]}
    assert missing["Validation accuracy"] == ["eval/*/accuracy"]
    assert missing["Gradient norm"] == ["actor/grad_norm"]


def test_a_plot_marks_the_alarms_that_watch_it():
    drawn, _ = plots_of([to_columns(make_records())])
    alarms = {plot["title"]: plot["alarms"] for plot in drawn}
    assert alarms["Gradient norm"] == ["Gradient norm"]
    assert alarms["Cut off or failed"] == ["Failed rewards"]  # no share of truncated was logged
    assert alarms["Reward"] == []


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    values = [math.sin(i / 50) for i in range(10_000)]
    values[1234], values[8765] = 40.0, -40.0
    series = Series(list(range(10_000)), values)
    short = thinned(series)
    assert len(short.steps) <= MOST_POINTS
    assert short.steps == sorted(set(short.steps))
    assert [values[step] for step in short.steps] == short.values
    assert {0, 1234, 8765, 9_999} <= set(short.steps)


def test_a_short_curve_stays_as_it_is():
    series = Series([0, 5, 9], [1.0, math.nan, math.inf])
    assert curve(series) == {"steps": [0, 5, 9], "values": [1.0, None, None], "smooth": None}
    assert curve(Series([0], [1e308]))["values"] == [None]  # its double would not be finite


def test_the_running_mean_is_that_of_the_steps_around():
    values = [float((i * 7919) % 101) for i in range(1_000)]
    found = running_mean(Series(list(range(1_000)), values))
    assert found is not None
    assert len(found.steps) == 200
    assert (found.steps[0], found.steps[-1]) == (0, 999)
    for step, mean in zip(*found, strict=True):
        around = values[max(0, step - 25) : step + 26]
        assert mean == pytest.approx(sum(around) / len(around), rel=1e-4)
    assert running_mean(Series(list(range(59)), values[:59])) is None


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
    shown = {row["key"]: row for row in data_of(page)["runs"][0]["summary"]}
    for row in summarize(to_columns(make_records())):
        best = "" if row.best is None else f"{row.best:.6g}"
        found = shown[row.key]
        assert (found["first"], found["last"]) == (f"{row.first:.6g}", f"{row.last:.6g}")
        assert found["best"] == best


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
    run = reported(tmp_path)
    card = {"name": "time", "value": "0:00:08", "note": "2 steps of 3.5 s"}
    assert card in run["cards"]
    row = {"key": "time/step", "first": "4", "last": "3", "best": "3", "best_step": "1"}
    assert row in run["summary"]


def test_a_file_without_a_step_that_trained_shows_no_time_of_steps(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 2, "time/step": 3.0}])
    run = reported(tmp_path)
    assert run["cards"] == []
    assert run["summary"] == []


def test_the_timeline_has_the_stages_in_order_and_who_was_waited_for():
    record = {"step": 7, "time/step": 4.0, "time/train": 1.5, "time/rollout": 1.0}
    record |= {"time/weight_sync": 0.5, "time/checkpoint": 0.25, "time/mine": 0.5}
    record |= {"perf/engines_busy_frac": 0.25, "perf/trainer_busy_frac": 0.375}
    (row,) = timeline(to_columns([record]))
    assert list(row["stages"].items()) == [
        ("checkpoint", 0.25),
        ("rollout", 1.0),
        ("train", 1.5),
        ("weight_sync", 0.5),
        ("mine", 0.5),
        ("other", 0.25),
    ]
    assert (row["seconds"], row["engines_busy_s"], row["trainer_busy_s"]) == (4.0, 1.0, 1.5)
    assert row["waits"] == {
        "the checkpoint": 0.25,
        "the engines": 1.0,
        "the weight sync": 0.5,
        "mine": 0.5,
        "other work": 0.25,
    }
    assert sum(row["waits"].values()) == row["seconds"] - row["trainer_busy_s"]


def test_a_step_whose_busy_times_were_not_measured_has_none():
    (row,) = timeline(to_columns([{"step": 0, "time/step": 1.0, "time/eval": 0.75}]))
    assert (row["engines_busy_s"], row["trainer_busy_s"]) == (None, None)


def test_many_steps_become_means_of_stretches(tmp_path):
    records = [{"step": s, "time/step": 1.0, "time/train": s % 2 / 2} for s in range(1_000)]
    write_lines(tmp_path / "metrics.jsonl", records)
    found = stretches(timeline(to_columns(records)))
    assert len(found) == MOST_POINTS
    assert (found[0]["first"], found[-1]["last"]) == (0, 999)
    assert all(b["first"] == a["last"] + 1 for a, b in itertools.pairwise(found))
    num = [stretch["last"] - stretch["first"] + 1 for stretch in found]
    total = sum(n * stretch["stages"]["train"] for n, stretch in zip(num, found, strict=True))
    assert total == pytest.approx(250, rel=1e-4)
    rows = reported(tmp_path)["timeline"]["rows"]
    assert [row["step"] for row in rows] == list(range(1_000 - MOST_STEPS, 1_000))


def test_the_page_shows_all_samples_and_the_settings(page):
    assert "<title>&lt;gmpo&gt;</title>" in page
    (run,) = data_of(page)["runs"]
    samples = run["samples"]
    assert samples["num"] == 3
    shown = [(s["step"], s["split"], s["prompt"], s["response"]) for s in samples["shown"]]
    assert shown == [
        (3, "train", "old prompt", "0"),
        (4, "train", "4+1=", "5"),
        (4, "val", "2+2=<|im_end|>", "4 & more"),
    ]
    assert [s["tokens"] for s in samples["shown"]] == [None, make_sample(4)["tokens"], None]
    assert ["actor.policy_loss.loss_mode", "geo_mean"] in run["config"]["rows"]


def test_what_is_missing_is_none(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "reward/mean": 0.5}])
    run = reported(tmp_path)
    assert run["samples"] == {"shown": [], "num": 0, "is_there": False}
    assert run["config"] is None
    assert run["memory"] is None


def test_the_same_run_gives_the_same_bytes(tmp_path, page):
    assert write_report(make_run_dir(tmp_path)).read_text() == page


def test_a_folder_without_steps_and_samples_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: there is no logged step"):
        write_report(tmp_path)


def test_a_run_that_ended_in_its_first_step_shows_its_samples(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [make_sample(0)])
    run = reported(tmp_path)
    assert [sample["prompt"] for sample in run["samples"]["shown"]] == ["0+1="]
    assert run["alarms"] == [{"ranges": None, "num_steps": 0, "value": None}] * 7


def test_a_run_that_still_writes_is_reported_up_to_its_last_whole_line(tmp_path):
    make_run_dir(tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 9, "reward/mean": 0.')
    run = reported(tmp_path)
    assert run["columns"]["reward/mean"]["steps"][-1] == NUM_STEPS - 1
    assert run["samples"]["shown"][-1]["step"] == 4


def test_two_runs_stand_side_by_side(tmp_path):
    one, other = make_run_dir(tmp_path / "one"), make_run_dir(tmp_path / "other")
    write_lines(other / "metrics.jsonl", [{"step": 0, "sft/loss": 0.5, "reward/mean": 0.25}])
    (other / "config.yaml").write_text("actor: {policy_loss: {loss_mode: gspo}}\nnew: [1]\n")
    file = write_comparison(one, other)
    assert file == one / "report_beside_other.html"
    page = file.read_text()
    data = data_of(page)
    assert "<title>&lt;gmpo&gt; beside other</title>" in page
    assert [run["title"] for run in data["runs"]] == ["<gmpo>", "other"]
    assert [run["columns"]["reward/mean"]["values"][0] for run in data["runs"]] == [0.1, 0.25]
    assert data["differences"] == [
        ["trainer.experiment_name", "<gmpo>", "-"],
        ["actor.policy_loss.loss_mode", "geo_mean", "gspo"],
        ["actor.clip_ratio_low", "0.4", "-"],
        ["new", "-", "[1]"],
    ]
    assert "sft/loss" in next(plot["keys"] for plot in data["plots"] if plot["title"] == "Loss")


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    one, other = make_run_dir(tmp_path / "one"), make_run_dir(tmp_path / "other")
    page = write_comparison(one, other).read_text()
    assert [run["title"] for run in data_of(page)["runs"]] == ["<gmpo> (one)", "<gmpo> (other)"]
    assert data_of(page)["differences"] == []


def test_the_command_writes_the_report_of_one_run_or_of_two(tmp_path, capsys):
    one, other = make_run_dir(tmp_path / "one"), make_run_dir(tmp_path / "other")
    main([str(one)])
    main([str(one), str(other)])
    files = [one / "report.html", one / "report_beside_other.html"]
    assert capsys.readouterr().out.splitlines() == list(map(str, files))
    assert [len(data_of(file.read_text())["runs"]) for file in files] == [1, 2]
    with pytest.raises(SystemExit) as ended:
        main([str(one), str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/metrics.jsonl: there is no logged step")
    assert error.count("\n") == 1


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


MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_no_text_of_a_run_is_markup_of_the_page(tmp_path):
    make_run_dir(tmp_path)
    sample = make_sample(4, prompt=MARKUP, uid=MARKUP, reward_parts={MARKUP: 1.0}, answer=MARKUP)
    write_lines(tmp_path / "samples.jsonl", [sample])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, f"eval/{MARKUP}/accuracy": 1.0}])
    (tmp_path / "config.yaml").write_text(f"trainer: {{experiment_name: '{MARKUP}'}}")
    page = write_report(tmp_path).read_text()
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "<img" not in page
    (run,) = data_of(page)["runs"]
    assert run["title"] == run["samples"]["shown"][0]["prompt"] == MARKUP
    assert f"eval/{MARKUP}/accuracy" in run["columns"]


def test_a_script_that_is_not_the_page_s_own_is_forbidden(page):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules.pop("script-src"))
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules.pop("style-src"))
    assert set(rules.values()) == {"'none'"}
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)


def test_what_stands_in_a_response_or_a_name_commands_no_terminal(tmp_path):
    """Half of a pair of surrogates in a ground truth too: a JSON file may well hold one."""
    make_run_dir(tmp_path)
    sample = {"step": 4, "uid": "t:0", "response": "\x1b[2J\u202e", "ground_truth": "\ud83d"}
    write_lines(tmp_path / "samples.jsonl", [sample])
    (tmp_path / "config.yaml").write_text('trainer: {experiment_name: "\\e[31m"}')
    page = write_report(tmp_path).read_bytes().decode()
    assert not [c for c in page if c in "\x1b\u202e"]
    (run,) = data_of(page)["runs"]
    assert run["title"] == r"\x1b[31m"
    (shown,) = run["samples"]["shown"]
    assert (shown["response"], shown["ground_truth"]) == (r"\x1b[2J\u202e", r"\ud83d")


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


def test_odd_names_and_huge_numbers_are_shown(tmp_path):
    record = {"step": 0, "eval/$x_{/accuracy": 0.5, "eval/\ud83d\x1b/accuracy": 0.5}
    record |= {"time/$y^": 1.0, "time/step": 1e308, "actor/grad_norm": 1e308}
    record |= {"reward/mean": math.inf, "reward/failed_frac": -math.inf}
    write_lines(tmp_path / "metrics.jsonl", [record | {"step": step} for step in range(30)])
    columns = reported(tmp_path)["columns"]
    assert {"eval/$x_{/accuracy", r"eval/\ud83d\x1b/accuracy", "time/$y^"} <= set(columns)


def test_a_link_in_a_stranger_s_folder_is_not_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    run_dir = make_run_dir(tmp_path / "run")
    names = ["report.html", "report.html.partial"]
    for name in names:
        (run_dir / name).symlink_to(mine)
    write_report(run_dir)
    assert mine.read_text() == "mine"
    assert not (run_dir / "report.html").is_symlink()


@pytest.mark.parametrize(
    "tokens",
    [
        {"texts": ["a"], "rollout_logprobs": [-1.0, -2.0]},
        {"texts": ["a"], "rollout_logprobs": None},
        {
            "texts": ["a"],
            "rollout_logprobs": [-1.0],
            "advantages": {"values": [1], "counts": [10**9]},
        },
        {"texts": "abc", "rollout_logprobs": [-1.0] * 3},
        [1, 2],
    ],
)
def test_tokens_of_another_form_are_left_out(tmp_path, tokens):
    write_lines(tmp_path / "samples.jsonl", [make_sample(0, tokens=tokens)])
    assert reported(tmp_path)["samples"]["shown"][0]["tokens"] is None
