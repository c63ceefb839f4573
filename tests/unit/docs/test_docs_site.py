"""The site of docs/: it builds without a warning, needs no network, and what is generated says
everything that the code has."""

from __future__ import annotations

import ast
import html
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from mcore_rl.algorithms.advantages import ADVANTAGES
from mcore_rl.algorithms.losses import POLICY_LOSSES
from mcore_rl.config.run import RunConfig
from mcore_rl.config.translate import TABLE

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks():
    """Return the module that mkdocs calls, with the modules beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools" / "docs"))
        import hooks

        yield hooks


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return the folder of the site, built as `make docs` does it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "", "a warning"
    return folder


@pytest.mark.starts_processes
def test_the_site_builds_without_a_warning_and_has_every_page(site):
    names = {page.stem for page in DOCS.glob("*.md")}
    assert len(names) > 20
    assert names | {"index", "configuration", "metrics", "verl-options"} <= {
        page.stem for page in site.glob("*.html")
    }
    assert (site / "architecture.svg").is_file()
    assert (site / "flow.svg").is_file()
    assert (site / "quickstart.svg").is_file()


@pytest.mark.starts_processes
def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.glob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon)[^>]*href=\"?([^\s\">]+)", text)
        assert len(loaded) >= 2
        assert [name for name in loaded if name.startswith(("http", "//"))] == [], page.name


@pytest.mark.starts_processes
def test_files_that_a_page_includes_are_in_it(site):
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "extending.html").read_text()))
    files = re.findall(r'^--8<-- "(.*)"$', (DOCS / "extending.md").read_text(), re.MULTILINE)
    assert len(files) > 10
    for file in files:
        assert (ROOT / file).read_text().strip() in text, file


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text().split("nav:")[1])
    shown = {
        page if isinstance(page, str) else next(iter(page.values()))
        for section in nav
        for pages in section.values()
        for page in (pages if isinstance(pages, list) else [pages])
    }
    assert {page.name for page in DOCS.glob("*.md")} <= shown


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_metric_that_is_written_is_explained_and_no_other(hooks):
    page = hooks.metrics_page
    assert set(page.written_keys()) == set(page.MEANINGS)
    assert {key.split("/")[0] for key in page.MEANINGS} == set(page.SECTIONS)
    shown = re.findall(r"^\| `([^`]+)` \| ", page.page(), re.MULTILINE)
    assert sorted(shown) == sorted(page.MEANINGS)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('{"a/b": mean(1.0)}', [("a/b", "mean")]),
        ('x["a/b"] = metrics.maximum(y)', [("a/b", "max")]),
        ('{f"{self.role}/lr": total(1.0)}', [("<role>/lr", "sum")]),
        ('{f"a/{n}": total(v) for n, v in x}', [("a/<n>", "sum")]),
        ('{"a/b": open("c/d"), "e": mean(1.0)}', []),
        (
            'masked_sizes("a", x, m)',
            [
                ("a/mean", "mean over trained tokens"),
                ("a/abs_mean", "mean over trained tokens"),
                ("a/max", "max"),
            ],
        ),
    ],
)
def test_the_search_sees_where_a_metric_is_written(hooks, source, found):
    assert list(hooks.metrics_page._written_in(ast.parse(source))) == found


def keys_of(cls: type, above: str = "") -> list[str]:
    """Return every key of a section, in full."""
    types = get_type_hints(cls)
    return [
        key
        for field in fields(cls)
        if field.init
        for key in (
            keys_of(types[field.name], f"{above}{field.name}.")
            if is_dataclass(types[field.name])
            else [above + field.name]
        )
    ]


def test_the_reference_of_the_configuration_has_every_key_and_every_option(hooks):
    text = hooks.configuration_page.page()
    rows = re.findall(r"^\| `([\w.]+)` \| ", text, re.MULTILINE)
    options = [
        f"{section}.{field.name}"
        for section, registry in (("actor", POLICY_LOSSES), ("algorithm", ADVANTAGES))
        for config in {registry.get(name).config for name in registry}
        for field in fields(config)
    ]
    assert len(options) > 10
    keys = [key for key in keys_of(RunConfig) if "." in key]
    assert sorted(rows) == sorted([*keys, *options])


def test_a_meaning_is_the_docstring_under_a_field_and_a_default_that_of_the_class(hooks):
    text = hooks.configuration_page.page()
    assert (
        "| `actor.grad_clip` | float | `1.0` | Largest gradient norm; 0 turns clipping off. |\n"
        in text
    )
    assert (
        "| `trainer.val_before_train` | bool | `true` | Validate before the first step. |" in text
    )
    assert "### algorithm: options of gpg\n" in text
    assert "Unless they are set: 0.4 downwards, 0.4 upwards.\n" in text


def test_the_table_of_verl_s_options_has_every_row(hooks):
    text = hooks.verl_page.page()
    rows = re.findall(r"^\| `([\w.*]+)` \| ", text, re.MULTILINE)
    assert sorted(rows) == sorted(TABLE)
    assert "| `actor.optim.clip_grad` | `actor.grad_clip` |\n" in text
    assert "| `hybrid_engine` | Actor and engine share their devices. Accepted: `true`. |" in text


def test_the_picture_has_every_folder_above_what_it_imports(hooks):
    architecture = hooks.architecture
    whole, parts = architecture.read_rules()
    rows = architecture.in_rows(architecture.without_circles(whole, parts))
    height = {name: -number for number, row in enumerate(rows) for name in row}
    assert set(height) == set(whole)
    for name, names in whole.items():
        for other in names:
            is_mutual = name in whole[other]
            assert height[name] == height[other] if is_mutual else height[name] > height[other]
    svg = architecture.svg()
    assert [name for name in whole if f">{name}</text>" not in svg] == []


def test_a_line_of_the_picture_is_left_out_when_others_say_it(hooks):
    graph = {"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()}
    assert hooks.architecture.direct(graph) == graph | {"a": frozenset("b")}


def test_a_line_that_would_close_a_circle_does_not_count(hooks):
    whole = {"a": frozenset("b"), "b": frozenset(), "c": frozenset()}
    parts = {"a": frozenset("c"), "b": frozenset("a"), "c": frozenset("b")}
    graph = hooks.architecture.without_circles(whole, parts)
    assert graph == {"a": frozenset("bc"), "b": frozenset(), "c": frozenset("b")}
    assert hooks.architecture.in_rows(graph) == [["a"], ["c"], ["b"]]


def test_links_of_the_root_s_files_lead_to_pages(hooks):
    text = "[a](docs/gpu.md#layers) [b](CONTRIBUTING.md) [c](README.md)"
    assert hooks._linked(text) == "[a](gpu.md#layers) [b](contributing.md) [c](index.md)"
