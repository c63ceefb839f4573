"""The export at the end of a run: the folder of an earlier one stays until the new one is whole."""

from pathlib import Path
from typing import Any

import pytest

from mcore_rl.errors import CheckpointError
from mcore_rl.run.export import export_model


class Exports:
    """Stands for the cluster and its trainer: writes one file, or half of it and then fails."""

    def __init__(self, text, fails=False):
        self.text, self.fails = text, fails
        self.trainer = self

    def export_hf(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "weights").write_text(self.text[: 1 if self.fails else None])
        if self.fails:
            raise CheckpointError("no space left", rank=1, role="worker", step=3)


def exports(text, fails=False) -> Any:
    return Exports(text, fails)


def content(run_dir):
    return {path.name: (path / "weights").read_text() for path in run_dir.iterdir()}


def test_a_new_export_takes_the_place_of_an_earlier_one(tmp_path, capsys):
    for text in ("first", "second"):
        export_model(exports(text), tmp_path)
        assert content(tmp_path) == {"hf_model": text}
        assert capsys.readouterr().out == f"model   {tmp_path / 'hf_model'}\n"


def test_an_export_that_fails_leaves_the_earlier_one_and_the_next_one_succeeds(tmp_path):
    export_model(exports("first"), tmp_path)
    with pytest.raises(CheckpointError, match=r"\[role worker, rank 1, step 3\] no space left"):
        export_model(exports("second", fails=True), tmp_path)
    assert content(tmp_path) == {"hf_model": "first", "hf_model.partial": "s"}
    export_model(exports("third"), tmp_path)
    assert content(tmp_path) == {"hf_model": "third"}


def test_an_export_that_was_killed_between_two_renames_is_put_back(tmp_path):
    export_model(exports("first"), tmp_path)
    (tmp_path / "hf_model").rename(tmp_path / "hf_model.previous")
    with pytest.raises(CheckpointError):
        export_model(exports("second", fails=True), tmp_path)
    assert content(tmp_path)["hf_model"] == "first"


def test_what_a_kill_leaves_after_the_swap_goes_with_the_next_export(tmp_path):
    export_model(exports("second"), tmp_path)
    (tmp_path / "hf_model.previous").mkdir()
    (tmp_path / "hf_model.previous" / "weights").write_text("first")
    with pytest.raises(CheckpointError):
        export_model(exports("third", fails=True), tmp_path)
    assert content(tmp_path)["hf_model"] == "second"
