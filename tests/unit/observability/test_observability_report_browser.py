"""The report as a browser shows it: no script error, every section, working filters, pictures.

Skipped where there is no browser. States are set by the address, as a reader's link does.
"""

from __future__ import annotations

import functools
import html
import re

import numpy as np
import pytest
from PIL import Image

from mcore_rl.observability.alarms import ALARMS
from mcore_rl.observability.report.curves import PLOTS
from mcore_rl.observability.report.page import write_comparison, write_report
from tests.unit.observability import browser
from tests.unit.observability.report_runs import (
    make_records,
    make_run_dir,
    make_sample,
    write_lines,
)

pytestmark = pytest.mark.starts_processes

MARKUP = "</script><script>throw 1</script><img src=x onerror='throw 2'>"


def make_samples():
    samples = [
        make_sample(step, reward=float(index), index=index)
        for step in range(5)
        for index in range(2)
    ]
    samples.append(make_sample(4, "val", prompt="what is seven?", index=2))
    samples.append(make_sample(2, prompt=MARKUP, reward=0.5, reward_status="failed", tokens=None))
    return samples


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = make_run_dir(tmp_path_factory.mktemp("run"))
    write_lines(run_dir / "samples.jsonl", make_samples())
    return run_dir


@pytest.fixture(scope="module")
def page(run_dir):
    return write_report(run_dir)


@pytest.fixture(scope="module")
def show(page, tmp_path_factory):
    """Return a function: state -> the page as text; the browser shows each state once."""
    folder = tmp_path_factory.mktemp("browser")
    return functools.cache(lambda state="": browser.dom(page, folder, state))


def texts(dom, tag, name=""):
    """Return the texts of the elements with a tag, and a class where one is named."""
    of_class = rf' class="[^"]*\b{name}\b[^"]*"' if name else ""
    found = re.findall(rf"<{tag}{of_class}[^>]*>(.*?)</{tag}>", dom, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in found]


def test_every_section_is_there(show):
    dom = show()
    assert texts(dom, "h1") == ["<gmpo>"]
    assert texts(dom, "h2") == [
        "Curves",
        "Timeline",
        "Alarms",
        "Samples",
        "Numbers",
        "Configuration",
    ]
    titles = [plot.title for plot in PLOTS]
    assert texts(dom, "h3") == [*titles, "Time per step (seconds)", "What they mean"]
    assert dom.count('role="img"') == len(titles) + 1
    legends = texts(dom, "div", "legend")
    assert "mean -0.6568" in legends
    assert "rollout/failed_frac 0.5reward/failed_frac 0" in legends
    assert texts(dom, "p", "banner") == ["1 of 7 alarms fired: Gradient norm. Where"]
    assert texts(dom, "div", "card")[:1] == ["reward/mean-0.657from 0.100"]
    assert "eval/gsm8k/accuracy" in texts(dom, "td")
    assert "the same page: docs/alarms.md" in dom


def test_an_alarm_is_shown_with_its_threshold_its_steps_and_its_explanation(show):
    dom = show("gradient-norm")
    row = next(row for row in texts(dom, "tr") if row.startswith("Gradient norm"))
    norm = next(alarm for alarm in ALARMS if alarm.title == "Gradient norm")
    assert row == f"Gradient norm{norm.threshold}actor/grad_norm2 (nan at step 2)"
    assert next(row for row in texts(dom, "tr") if row.startswith("Truncation")).endswith(
        "not logged"
    )
    assert re.findall(r'<details id="([^"]*)" open', dom) == ["gradient-norm"]
    for alarm in ALARMS:
        assert f'href="#{alarm.anchor}"' in dom
    assert "an update whose norm is not finite is skipped" in dom


def count(dom):
    found = re.search(r'id="count">(\d+) of (\d+) samples', dom)
    assert found is not None
    return found.groups()


@pytest.mark.parametrize(
    ("state", "num"),
    [
        ("", 12),
        ("step=3", 2),
        ("step=4&split=val", 1),
        ("min=0.25&max=0.75", 1),
        ("search=SEVEN", 1),
        ("search=no+such+text", 0),
        ("step=4&search=seven&split=train", 0),
    ],
)
def test_the_filters_and_the_search_leave_what_matches(show, state, num):
    dom = show(state)
    assert count(dom) == (str(num), "12")
    assert len(texts(dom, "article", "sample")) == num


def test_a_sample_shows_its_reward_parts_tokens_and_versions(show):
    (sample,) = texts(show("step=3&min=1"), "article", "sample")
    facts = "step 3|train|train.parquet:3|sample 1|reward 1|acc 1|answer 4|ground truth 4"
    assert sample.startswith((facts + "|ended by stop|tokens 3|weights 3").replace("|", ""))
    assert sample.endswith("3+1=4 <|im_end|>")


def tokens(dom):
    """Return (color, title) of each token of the first sample."""
    found = re.findall(
        r'<span class="token" title="([^"]*)"(?: style="background: ([^"]*);")?>', dom
    )
    return [(color, title) for title, color in found]


def test_tokens_have_the_color_of_the_logprob_difference_and_say_their_numbers(show):
    shown = tokens(show("step=3&min=1&color=difference"))
    # 0 and 1e-4 have none, 1 has the most; 0.01 is half way on the logarithmic scale.
    assert [color for color, _ in shown] == [
        "rgba(220, 38, 38, 0)",
        "rgba(220, 38, 38, 0.4)",
        "rgba(220, 38, 38, 0.8)",
    ]
    assert shown[2][1] == (
        "engine's logprob -0.125\ntrainer's -1.125, difference -1\nadvantage -0.5\nweights 3"
    )


def test_tokens_have_the_color_of_the_advantage_and_of_the_version(show):
    advantages = [color for color, _ in tokens(show("step=3&min=1&color=advantage"))]
    assert advantages[:2] == ["rgba(22, 163, 74, 0.65)"] * 2
    assert advantages[2] == "rgba(234, 88, 12, 0.65)"
    versions = [color for color, _ in tokens(show("step=3&min=1&color=version"))]
    assert len(set(versions)) == 1
    assert versions[0].startswith("rgba")


def test_what_was_not_measured_is_said(show):
    dom = show("step=4&split=val")
    assert "The difference is not measured in validations." in dom
    assert "There are no advantages in validations." in show("step=4&split=val&color=advantage")


def test_markup_in_a_sample_is_text(show):
    dom = show("step=2&min=0.5&max=0.5")
    (sample,) = texts(dom, "article", "sample")
    assert MARKUP in sample
    assert "0.5 (failed)" in sample
    assert "<img" not in dom


def test_the_timeline_says_who_waited_for_whom(show):
    dom = show("last=2")
    rows = texts(dom.split('<table class="gantt"')[1].split("</table>")[0], "tr")[1:]
    assert [row[0] for row in rows] == ["4", "3"]
    # 3 s; the trainer busy 0.4 of them, the engines 0.54: rollout 1 s, 0.5 s in no stage.
    assert rows[0] == "43.0 s1.8 sthe engines 1.0 s1.4 s"
    (waiting,) = re.findall(r'<ul class="prose" id="waiting">(.*?)</ul>', dom)
    said = html.unescape(re.sub("<[^>]*>", "", waiting))
    assert "Trainer: busy 40 % of 6.0 s. It waited for the engines 2.0 s, other work 1.0 s." in said
    assert "Engines: busy 54 %, without requests for 2.8 s." in said


def test_any_other_metric_can_be_drawn(show):
    assert "time/train" not in texts(show(), "h3")
    assert "time/train" in texts(show("metric=time/train"), "h3")


def test_two_runs_stand_side_by_side(run_dir, tmp_path):
    other = make_run_dir(tmp_path / "other")
    records = [record | {"reward/mean": 0.9} for record in make_records()]
    write_lines(other / "metrics.jsonl", records)
    (other / "config.yaml").write_text("actor: {policy_loss: {loss_mode: gspo}}")
    file = write_comparison(run_dir, other)
    dom = browser.dom(file, tmp_path, "run=1")
    assert "<h1>&lt;gmpo&gt; beside other</h1>" in dom
    numbers = [row for row in texts(dom, "tr") if row.startswith("reward/mean")]
    assert numbers == ["reward/mean-0.6568020.91.00930.9"]
    assert "actor.policy_loss.loss_modegeo_meangspo" in texts(dom, "tr")
    assert len(texts(dom, "p", "banner")) == 2
    assert count(dom) == ("3", "3")
    file.unlink()


def num_colored(pixels):
    """Return how many pixels are not nearly grey."""
    spread = pixels.max(-1).astype(int) - pixels.min(-1)
    return int((spread > 90).sum())


def picture_of(page, folder, state=""):
    """Return the pixels of the whole page: a longer one would be moved up to its samples."""
    file = browser.screenshot(page, folder, state, size=(1280, 6000))
    return np.asarray(Image.open(file).convert("RGB"))


def test_the_picture_of_the_page_has_curves_and_bars(page, tmp_path):
    picture = picture_of(page, tmp_path)
    assert picture.shape == (6000, 1280, 3)
    for half in (picture[:, :640], picture[:, 640:]):
        for top in range(250, 2000, 350):  # every row of curves
            assert num_colored(half[top : top + 350]) > 300


def test_the_picture_of_a_sample_has_the_color_of_its_tokens(page, tmp_path):
    """The last token has the strongest red: 220, 38, 38 by four fifths over white."""
    pixels = picture_of(page, tmp_path, "step=3&min=1").astype(int)
    is_red = abs(pixels - [227, 81, 81]).max(-1) < 12
    assert is_red.sum() > 500
    none = picture_of(page, tmp_path, "step=3&min=1&color=none").astype(int)
    assert (abs(none - [227, 81, 81]).max(-1) < 12).sum() < 50


def test_a_page_without_samples_times_and_configuration_is_whole(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "reward/mean": 0.5}])
    dom = browser.dom(write_report(tmp_path), tmp_path)
    assert "The run has no samples.jsonl." in dom
    assert "The run logged no times." in dom
    assert "The run has no config.yaml." in dom
    assert "Validation accuracy (needs eval/*/accuracy)" in dom


def test_a_run_without_metrics_shows_its_samples(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [make_sample(0)])
    dom = browser.dom(write_report(tmp_path), tmp_path)
    assert count(dom) == ("1", "1")


def test_odd_values_in_a_stranger_s_samples_break_nothing(tmp_path):
    odd = [
        {"step": 0},
        make_sample(0, reward="high", versions="x", reward_parts=[1, {"a": 2}], prompt=3, uid=None),
        make_sample(0, versions=[[1, 0, 10**9], [float("nan")] * 3], num_tokens="many"),
        make_sample(0, reward=float("inf"), ground_truth={"a": [1]}, response=["x"]),
    ]
    write_lines(tmp_path / "samples.jsonl", odd)
    dom = browser.dom(write_report(tmp_path), tmp_path, "search=a")
    assert int(count(dom)[0]) >= 1
    assert count(browser.dom(tmp_path / "report.html", tmp_path)) == ("4", "4")
