"""Each process logs at its level, with its role and rank, and noisy libraries stay quiet."""

from __future__ import annotations

import logging

import pytest

from mcore_rl.observability.log_setup import QUIETED_LOGGERS, setup_logging


@pytest.fixture(autouse=True)
def _root_logger_restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    quieted = {name: logging.getLogger(name).level for name in QUIETED_LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old_level in quieted.items():
        logging.getLogger(name).setLevel(old_level)


def test_rank_0_logs_info_with_role_and_rank(capsys):
    setup_logging(0, "controller")
    logging.getLogger("mcore_rl.loop").info("step %d", 3)
    assert "INFO [controller 0] mcore_rl.loop: step 3\n" in capsys.readouterr().err


def test_other_ranks_log_warnings_only(capsys):
    setup_logging(2, "actor")
    logging.getLogger("mcore_rl.megatron").info("hidden")
    logging.getLogger("mcore_rl.megatron").warning("shown")
    text = capsys.readouterr().err
    assert "hidden" not in text
    assert "WARNING [actor 2] mcore_rl.megatron: shown\n" in text


def test_a_second_setup_replaces_the_first(capsys):
    setup_logging(0, "controller")
    setup_logging(0, "actor")
    logging.getLogger("x").info("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize("name", QUIETED_LOGGERS)
def test_noisy_libraries_stay_quiet_below_warning(name, capsys):
    setup_logging(0, "controller")
    logging.getLogger(f"{name}.part").info("hidden")
    logging.getLogger(f"{name}.part").warning("shown")
    text = capsys.readouterr().err
    assert "hidden" not in text
    assert "shown" in text


def test_a_response_in_a_log_line_or_a_traceback_commands_no_terminal(capsys):
    setup_logging(0, "controller")
    try:
        raise ValueError("of the reward: \x1b[2J")
    except ValueError:
        logging.getLogger("x").exception("the response %s", "\x1b[31mred\x9b")
    err = capsys.readouterr().err
    assert r"the response \x1b[31mred\x9b" in err
    assert r"ValueError: of the reward: \x1b[2J" in err
    assert "\x1b" not in err
