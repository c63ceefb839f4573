"""What a contributor is told: the pages, the make targets, the workflows and the forms for issues
name what there is; and the guard that keeps processes out of the fast tests."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mcore_rl

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def test_the_guide_names_files_and_folders_that_are_there():
    named = set(re.findall(r"`((?:mcore_rl|tests|examples|configs)/[\w/.]*)`", GUIDE))
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_guide_names_every_folder_of_the_package():
    folders = {path.parent.name for path in (ROOT / "mcore_rl").glob("*/*.*")} - {"__pycache__"}
    assert {name for name in folders if f"`mcore_rl/{name}/`" not in GUIDE} == set()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "README.md"])
def test_the_targets_that_a_page_names_are_those_of_the_makefile(page):
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE))
    assert named
    assert named <= TARGETS


def test_every_target_but_that_of_a_file_is_phony_and_says_at_the_top_what_it_does():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS
    assert set(re.findall(r"^# make ([a-z-]+) ", MAKEFILE, re.MULTILINE)) == TARGETS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_runs_make_targets_and_nothing_else_of_ours(file):
    workflow = yaml.safe_load(file.read_text())
    (job,) = workflow["jobs"].values()
    assert set(job["strategy"]["matrix"]["target"]) <= TARGETS
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert [line for line in commands if "apt-get" not in line] == ["make ${{ matrix.target }}"]
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in uses), uses


def test_a_change_must_pass_the_linters_and_the_default_suite():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert {"lint", "test"} <= set(job["strategy"]["matrix"]["target"])


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_a_form_for_issues_has_the_fields_that_github_asks_for(file):
    form = yaml.safe_load(file.read_text())
    assert set(form) == {"name", "description", "body"}
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    for field in form["body"]:
        assert field["type"] == "textarea"
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert {"label"} <= set(field["attributes"]) <= {"label", "description", "render"}
    assert any(field.get("validations") == {"required": True} for field in form["body"])


def test_the_changelog_begins_with_the_version_of_the_package():
    sections = re.findall(r"^## (\S+?)(?:,|$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == mcore_rl.__version__
    assert len(set(sections)) == len(sections)


def test_a_test_is_in_one_of_the_two_suites_and_the_fast_ones_are_of_the_default_one():
    default = (ROOT / "pyproject.toml").read_text()
    assert "-m 'not slow'" in default
    assert re.search(r"^test: .*\n\t\$\(PYTEST\)$", MAKEFILE, re.MULTILINE)
    fast, slow = (
        re.search(rf"^test-{name}: .*\n\t(.*)$", MAKEFILE, re.MULTILINE)
        for name in ("fast", "slow")
    )
    assert fast is not None
    assert fast[1] == '$(PYTEST_FAST) tests/unit -m "not slow and not starts_processes"'
    assert slow is not None
    assert slow[1].endswith("-m pytest -m slow")


def _fork():
    if os.fork() == 0:
        os._exit(0)


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"]),
        lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
        lambda: multiprocessing.get_context("fork").Process(target=print).start(),
        lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
        _fork,
    ],
    ids=["program", "spawned", "forked", "posix_spawn", "fork"],
)
def test_a_test_that_starts_a_process_and_does_not_say_so_fails(start):
    with pytest.raises(pytest.fail.Exception, match=r"mark it with pytest\.mark\.starts_processes"):
        start()


@pytest.mark.starts_processes
def test_a_test_that_says_so_starts_one():
    assert subprocess.run(["true"]).returncode == 0


def test_a_test_with_the_fixture_of_processes_has_the_marker(processes, request):
    assert request.node.get_closest_marker("starts_processes") is not None
