"""The files of all processes of a run, read as one."""

from __future__ import annotations

import logging

import pytest

from mcore_rl.errors import UserError
from mcore_rl.logs import main
from mcore_rl.observability.log_setup import log_to_file, setup_logging
from mcore_rl.observability.log_view import merged_lines

TIME = "2026-11-29T04:00:00."


def write(run_dir, name: str, *lines: str) -> None:
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "logs" / name).write_text("".join(f"{line}\n" for line in lines))


def test_lines_of_several_processes_come_in_the_order_of_their_time(tmp_path, capsys):
    write(tmp_path, "controller-0.log", f"{TIME}001 INFO a", f"{TIME}004 INFO b")
    write(tmp_path, "worker-0.log", f"{TIME}002 WARNING c", f"{TIME}003 INFO d")
    main([str(tmp_path)])
    assert [line[-1] for line in capsys.readouterr().out.splitlines()] == ["a", "c", "d", "b"]


def test_a_traceback_stays_with_its_line(tmp_path):
    trace = ["Traceback (most recent call last):", '  File "x"', "ValueError: no"]
    write(tmp_path, "worker-0.log", f"{TIME}001 ERROR failed", *trace, f"{TIME}005 INFO later")
    write(tmp_path, "worker-1.log", f"{TIME}003 INFO between")
    assert list(merged_lines(tmp_path)) == [
        f"{TIME}001 ERROR failed",
        *trace,
        f"{TIME}003 INFO between",
        f"{TIME}005 INFO later",
    ]


def test_a_folder_without_log_lines_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no log lines: there is no logs/\*\.log in it"):
        list(merged_lines(tmp_path))


def test_a_file_has_info_of_every_rank_behind_what_was_there(tmp_path, capsys):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        for text in ("first", "second"):
            setup_logging(3, "worker")
            log_to_file(tmp_path / "logs", 3, "worker")
            logging.getLogger("mine").info(text)
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    lines = list(merged_lines(tmp_path))
    assert [line.partition(" ")[2] for line in lines] == [
        "INFO [worker 3] mine: first",
        "INFO [worker 3] mine: second",
    ]
    assert (tmp_path / "logs" / "worker-3.log").stat().st_mode & 0o077 == 0
    assert capsys.readouterr().err == "", "on stderr rank 3 warns only"
