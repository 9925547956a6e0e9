"""Make the next item of an iteration in a thread while the caller uses the one before."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items in their order, each made while the caller used the one before; memory holds two.

    An error in making an item comes up in its place. If the caller stops early, this waits for the item that is made.
    """
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(_take, source)
        while taken := following.result():
            following = thread.submit(_take, source)
            yield taken.pop()


def _take(source: Iterator[T]) -> list[T]:
    """Return the next item in a list, which is empty at the end."""
    return [item for _, item in zip(range(1), source, strict=False)]
