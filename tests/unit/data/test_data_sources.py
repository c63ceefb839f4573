"""Folders and data sets of the hub, read without a network from the layout that they have there."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import constants

from mcore_rl.data.rows import read_rows
from mcore_rl.data.sources import find_files
from mcore_rl.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes one-row files into a folder, each row naming its file."""

    def write(*names, into="data"):
        for name in names:
            file = tmp_path / into / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"file": name}))
        return tmp_path / into

    return write


def read(name):
    return [row.columns["file"] for row in read_rows(str(name))]


def test_a_file_is_itself_whatever_is_in_its_name(folder):
    name = folder("a:b@c.jsonl") / "a:b@c.jsonl"
    assert find_files(str(name)) == [name]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00002.json", "data/train-00001-of-00002.json", "data/test-0.json"),
        ("train/0000.json", "train/0001.json", "test/0000.json"),
        ("train_easy.json", "train.json", "validation.json", "README.md", "dataset_infos.json"),
    ],
)
def test_a_split_of_a_folder_is_found_by_its_name_and_in_order(folder, names):
    root = folder(*names)
    train = sorted(name for name in names if "train" in name)
    assert read(root) == read(f"{root}@train") == train
    other = "validation" if "validation.json" in names else "test"
    assert read(f"{root}@{other}") == [name for name in names if other in name]


def test_files_that_no_split_names_are_all_of_the_training_split(folder):
    root = folder("a.json", "b.jsonl")
    assert read(root) == ["a.json", "b.jsonl"]
    with pytest.raises(UserError, match=r"of the split 'test'\. Name a file, or another split"):
        read(f"{root}@test")


def test_one_of_several_configurations_has_to_be_named(folder):
    root = folder("main/train-0.json", "socratic/train-0.json", "main/test-0.json")
    assert read(f"{root}:socratic@train") == ["socratic/train-0.json"]
    with pytest.raises(UserError, match=r"'train' is in main, socratic\. Name one of them after"):
        read(root)
    with pytest.raises(UserError, match="holds no Parquet or JSON file"):
        read(f"{root}:none@train")


def test_a_data_set_of_the_hub_is_read_from_its_cache(folder, tmp_path, monkeypatch):
    """The library's real cache, as it lies on disk; for the download see test_data_hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = "hub/datasets--someone--sums"
    folder("main/train-0.json", "main/test-0.json", into=f"{cached}/snapshots/{commit}")
    refs = tmp_path / cached / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert read("someone/sums") == ["main/train-0.json"]
    assert read("someone/sums:main@test") == ["main/test-0.json"]
    with pytest.raises(UserError, match=r"someone/else@test: .*no such data set.*HF_HUB_OFFLINE=0"):
        read("someone/else@test")


@pytest.mark.parametrize(
    "name", ["", "none", "/none/at/all", "none/train.parquet", "a/b/c", "..@x"]
)
def test_what_is_neither_file_nor_folder_nor_data_set_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such file|no Parquet or JSON file"):
        find_files(name)
