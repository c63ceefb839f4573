"""Reading and writing at the same time: the next item is made while the current one is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END: Any = object()


def made_ahead(items: Iterable[Item], count: int = 2) -> Generator[Item, None, None]:
    """Yield the items in order; a thread of their own makes up to `count` of them ahead.

    An error in making an item is raised in the item's place. When the caller stops early, the
    thread ends with the items that it has begun.
    """
    coming = iter(items)
    with ThreadPoolExecutor(1) as maker:
        ahead = deque(maker.submit(next, coming, _END) for _ in range(count))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(maker.submit(next, coming, _END))
            yield item
