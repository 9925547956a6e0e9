"""Divide the preparation of one dataset among the tasks of a job array: `--part 2/3`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import UsageError

PART_OPTION = "part"
"""Among the options of a manifest: which task of an array made the dataset; absent if the dataset is whole."""


@dataclass(frozen=True, slots=True)
class ArrayTask:
    """One task of a job array; it prepares its own input files into a dataset of its own, for `data merge`.

    Args:
        index: which task, from 1.
        count: number of tasks.

    Raises:
        UsageError: there is no such task.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(f"--part {self} is not one of 1/{self.count} to {self.count}/{self.count}", fix=_EXAMPLE)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "ArrayTask":
        """Read `I/N`; UsageError for any other form."""
        index, _, count = text.partition("/")
        if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and int(count)):
            raise UsageError(f"--part {text} is not of the form I/N", fix=_EXAMPLE)
        return cls(int(index), int(count))

    def folder(self, output: Path) -> Path:
        """Return the folder beside the dataset `output` into which this task writes."""
        return output.with_name(f"{output.name}.part-{self.index}-of-{self.count}")

    def choose(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return the items of this task: consecutive ones, so that the tasks in order cover all items in order."""
        if len(items) < self.count:
            what = f"--part {self}: there are {len(items)} input files for {self.count} parts"
            raise UsageError(what, fix=f"use at most {len(items)} parts; an input file is not divided")
        return items[len(items) * (self.index - 1) // self.count : len(items) * self.index // self.count]


_EXAMPLE = "use --part 1/3, 2/3 and 3/3, for example"
