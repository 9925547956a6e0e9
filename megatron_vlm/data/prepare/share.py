"""Divide the preparation of one dataset among the jobs of an array: `--part 2/3`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import UsageError

SHARE_OPTION = "part"
"""Among the options of a manifest: which share the dataset is; absent where it is whole."""


@dataclass(frozen=True, slots=True)
class Share:
    """One of several shares of the input files; each is a dataset of its own until `data merge` joins them.

    Args:
        index: which one, from 1.
        count: how many there are.

    Raises:
        UsageError: there is no such share.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(f"--part {self} is none of 1/{self.count} to {self.count}/{self.count}", fix=_EXAMPLE)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read `I/N`.

        Raises:
            UsageError: the text is something else.
        """
        index, _, count = text.partition("/")
        if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and int(count)):
            raise UsageError(f"--part {text} is not of the form I/N", fix=_EXAMPLE)
        return cls(int(index), int(count))

    def folder(self, output: Path) -> Path:
        """Return where this share of the dataset `output` is written: beside it."""
        return output.with_name(f"{output.name}.part-{self.index}-of-{self.count}")

    def choose(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return the items of this share: consecutive ones, so that the shares in order are all items in order.

        Raises:
            UsageError: there are fewer items than shares.
        """
        if len(items) < self.count:
            raise UsageError(
                f"--part {self}: there are {len(items)} input files for {self.count} parts",
                fix=f"use at most {len(items)} parts; an input file is not divided",
            )
        return items[len(items) * (self.index - 1) // self.count : len(items) * self.index // self.count]


_EXAMPLE = "use --part 1/3, 2/3 and 3/3, for example"
