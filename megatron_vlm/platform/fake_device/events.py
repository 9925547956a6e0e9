"""What a program did on the fake device: waits of the host, and collectives. Needs no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class HostWait:
    """The host waits for the device: it reads a value, copies without `non_blocking`, or synchronises."""

    kind: Literal["read", "copy", "synchronize"]
    where: str
    """File and line of the call."""


@dataclass(frozen=True, slots=True)
class Group:
    """A process group; its members name it alike."""

    name: str
    ranks: tuple[int, ...]
    """Of the job, ascending."""

    def describe(self) -> str:
        """Return its name and ranks, shortened."""
        ranks = ", ".join(map(str, self.ranks[:4])) + (", ..." if len(self.ranks) > 4 else "")
        return f"{self.name} of {len(self.ranks)} ranks ({ranks})"


@dataclass(frozen=True, slots=True)
class Collective:
    """One call of a process group."""

    op: str
    """As c10d names it, e.g. "allreduce"; "send" and "recv" concern one peer."""
    group: Group
    dtype: str
    sizes: tuple[int, ...]
    """Elements of each tensor that is sent or reduced."""
    where: str
    """File and line of the call."""
    peer: int | None = None
    """Rank of the job that a message goes to or comes from, or the root; None where all ranks are alike."""

    @property
    def content(self) -> tuple[str, tuple[int, ...]]:
        """What a message and the one that receives it have in common."""
        return (self.dtype, self.sizes)

    @property
    def signature(self) -> tuple[str, str, tuple[int, ...], int | None]:
        """What must be the same on every member of the group."""
        return (self.op, self.dtype, self.sizes, self.peer)

    @property
    def amount(self) -> str:
        """Operator, elements and type, e.g. "allgather of 1,024 bfloat16"."""
        return f"{self.op} of {' + '.join(f'{size:,}' for size in self.sizes) or 'an'} {self.dtype}"

    @property
    def place(self) -> str:
        """Line of this package that made the call; of another package, where there is none."""
        return self.where.rpartition(" from ")[2]
