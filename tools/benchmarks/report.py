"""What all benchmarks share: CPU time of interleaved rounds, the table and the JSON file."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table."""

    work: str
    unit: str
    ours: float
    peers: dict[str, float]
    ratio: float | None
    """Ours over the best peer where more is better, the inverse where less is; None without a peer."""
    required: str
    met: bool


def parse_arguments(description: str, add: Callable[[argparse.ArgumentParser], None] = lambda _: None):
    """Return the command line: `--json FILE` and what `add` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    add(parser)
    return parser.parse_args()


def report(results: list[Result], json_file: Path | None) -> int:
    """Print the table, write the JSON file, and return 0 if every requirement is met."""
    for result in results:
        peers = ", ".join(f"{name} {value:.4g}" for name, value in result.peers.items())
        ratio = "" if result.ratio is None else f", ratio {result.ratio:.2f}"
        state = "met" if result.met else "NOT MET"
        sys.stdout.write(
            f"{result.work}: {result.ours:.4g} {result.unit} ({peers or 'no peer'}{ratio}); "
            f"required {result.required}: {state}\n"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0 if all(result.met for result in results) else 1


def cpu_seconds(rounds: int, **work: Callable[[], object]) -> dict[str, float]:
    """Return the median CPU seconds of each piece of work, in turns, so that a busy machine slows all alike."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            started = time.process_time()
            run()
            taken[name].append(time.process_time() - started)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}
