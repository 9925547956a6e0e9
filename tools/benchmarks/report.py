"""Shared by all benchmarks: CPU time of interleaved rounds, the rows of the result, the table and the JSON file.

A row of the JSON file has `work`, `unit`, `ours`, `peers`, `ratio`, `required` and `met`. If `ratio` is a number, it is
our figure divided by that of the best peer, and `required` is the lowest ratio allowed. If it is null, `required` is a
bound on `ours` in `unit`: a minimum for the fraction of positions used, a maximum for everything else. A ratio without
an installed peer is null, too, and never met.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_HEADINGS = ("work", "ours", "peers", "unit", "ratio", "required", "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result."""

    work: str
    unit: str
    ours: float
    required: float
    judged: Literal["ratio", "at least", "at most"] = "ratio"
    """Whether `required` is the lowest ratio to the best peer, or a bound on `ours`."""
    peers: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Our figure over that of the best peer; None for a bound, or without a peer."""
        return self.ours / max(self.peers.values()) if self.judged == "ratio" and self.peers else None

    @property
    def met(self) -> bool:
        """Whether the requirement is met."""
        if self.judged == "ratio":
            return self.ratio is not None and self.ratio >= self.required
        return self.ours >= self.required if self.judged == "at least" else self.ours <= self.required

    def tree(self) -> dict[str, Any]:
        """Return the row for the JSON file."""
        names = ("work", "unit", "ours", "peers", "ratio", "required", "met")
        return {name: getattr(self, name) for name in names}

    def cells(self) -> tuple[str, ...]:
        """Return the row for the table."""
        peers = ", ".join(f"{name} {value:.5g}" for name, value in self.peers.items())
        if self.judged == "ratio" and not peers:
            peers = "none installed"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        sign, times = "<=" if self.judged == "at most" else ">=", "x" if self.judged == "ratio" else ""
        required = f"{sign} {self.required:g}{times}"
        return self.work, f"{self.ours:.5g}", peers, self.unit, ratio, required, "met" if self.met else "NOT MET"


def parse_arguments(description: str, add: Callable[[argparse.ArgumentParser], None] = lambda _: None):
    """Parse the command line: `--json FILE` and the options that `add` adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    add(parser)
    return parser.parse_args()


def report(rows: Sequence[Row], json_file: Path | None, notes: Sequence[str] = ()) -> int:
    """Print table and notes, write the JSON file, and return 0 if every requirement is met."""
    lines = [_HEADINGS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(text.rstrip() + "\n")
    for note in notes:
        sys.stdout.write(f"note: {note}\n")
    if json_file is not None:
        json_file.write_text(json.dumps([row.tree() for row in rows], indent=1) + "\n")
    return 0 if all(row.met for row in rows) else 1


def is_installed(module: str) -> bool:
    """Return whether a peer can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def how_to_install(package: str) -> str:
    """Return the note for a peer that is not installed."""
    return f"{package} is not installed, so nothing is compared with it: pip install -r {_REQUIREMENTS}"


def describe_versions(*packages: str) -> str:
    """Return name and version of each package that is installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "measured with " + ", ".join(found)


def cpu_seconds(rounds: int, work: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median CPU seconds of each function, in this process and its children.

    The functions take turns, so that a busy machine slows all of them alike. The first round, in which modules are
    imported, is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            started = _cpu_clock()
            run()
            if number:
                taken[name].append(_cpu_clock() - started)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def _cpu_clock() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
