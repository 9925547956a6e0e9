"""What a run's metrics.jsonl says: losses, packing, throughput, and whether a resumed run equals a straight one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeCheck:
    """Losses of a killed and resumed run beside those of an uninterrupted one."""

    killed_after: int
    """Last iteration that the killed run logged."""
    resumed_from: int
    """Iteration of the checkpoint that the second start took up."""
    compared: tuple[int, ...]
    """Iterations that the uninterrupted run shares with the killed and resumed one."""
    different: tuple[int, ...]
    """Those in which loss or gradient norm differ in any bit."""

    @property
    def bit_equal(self) -> bool:
        """Whether it resumed, something was compared on both sides of the kill, and nothing differed."""
        crossed = any(iteration > self.killed_after for iteration in self.compared)
        return self.resumed_from > 0 and crossed and not self.different


def read_metrics(run_dir: Path) -> list[Record]:
    """Read the records of a run in order of iteration; a last line that a kill cut short is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # Only what ends in a newline was written whole.
    return sorted((json.loads(line) for line in lines[:-1] if line), key=lambda record: record["iteration"])


def check_resume(straight: Sequence[Record], killed: Sequence[Record], final: Sequence[Record]) -> ResumeCheck:
    """Compare loss and gradient norm, to the last bit, over all iterations of the uninterrupted run.

    Args:
        straight: records of the uninterrupted run.
        killed: records that the killed run had written when it died.
        final: records of the same folder after the second start. Those of the first start are still among them, with
            the same seconds: they tell where the second one began.
    """
    resumed = select_resumed(killed, final)
    expected = {record["iteration"]: _bits(record) for record in straight}
    # An iteration that ran on both sides of the kill is compared twice.
    found = [(record["iteration"], _bits(record)) for record in (*killed, *resumed)]
    return ResumeCheck(
        killed_after=max((record["iteration"] for record in killed), default=0),
        resumed_from=min((record["iteration"] for record in resumed), default=1) - 1,
        compared=tuple(sorted({iteration for iteration, _ in found if iteration in expected})),
        different=tuple(
            sorted({iteration for iteration, bits in found if iteration in expected and bits != expected[iteration]})
        ),
    )


def select_resumed(killed: Sequence[Record], final: Sequence[Record]) -> list[Record]:
    """Return the records that the second start wrote."""
    first = {record["iteration"]: record for record in killed}
    return [record for record in final if first.get(record["iteration"]) != record]


def measure_packing(records: Sequence[Record]) -> float:
    """Return the share of all positions that held a token, over a whole run."""
    positions = sum(record["tokens"] / (1.0 - record["padding"]) for record in records if record["tokens"])
    return sum(record["tokens"] for record in records) / positions if positions else 0.0


def measure_throughput(records: Sequence[Record]) -> float:
    """Return tokens a second over a whole run, start-up not counted."""
    seconds = sum(record["seconds"] for record in records)
    return sum(record["tokens"] for record in records) / seconds if seconds else 0.0


def source_names(records: Sequence[Record]) -> list[str]:
    """Return the datasets that have a loss of their own, in order of first appearance."""
    keys = (key for record in records for key in record if key.startswith("loss/"))
    return [key.removeprefix("loss/") for key in dict.fromkeys(keys)]


def _bits(record: Record) -> tuple[str, str]:
    return record["loss_hex"], record["grad_norm_hex"]
