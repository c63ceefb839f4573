"""Items that a thread makes ahead."""

from __future__ import annotations

import threading

import pytest

from mcore_rl.convert.ahead import made_ahead


def test_items_come_in_order_and_a_few_are_made_ahead():
    made = []

    def items():
        for number in range(6):
            made.append(number)
            yield number

    coming = made_ahead(items(), count=2)
    assert next(coming) == 0
    assert len(made) <= 3
    assert list(coming) == [1, 2, 3, 4, 5]
    assert list(made_ahead([])) == []


def test_a_failure_comes_in_its_place():
    def items():
        yield 1
        raise OSError("cut short")

    coming = made_ahead(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="cut short"):
        next(coming)


def test_the_next_item_is_made_while_one_is_used():
    is_used, can_go_on = threading.Event(), threading.Event()

    def items():
        yield 1
        assert is_used.wait(60)
        can_go_on.set()
        yield 2

    coming = made_ahead(items())
    assert next(coming) == 1
    is_used.set()
    assert can_go_on.wait(60)  # without another next
    assert next(coming) == 2


def test_nothing_more_is_made_for_a_caller_that_stopped():
    made = []
    coming = made_ahead(made.append(number) for number in range(100))
    next(coming)
    coming.close()
    assert len(made) <= 4
