"""Packing without cutting samples: fraction of the positions used, and CPU time.

    python tools/benchmarks/pack.py --json pack.json

The peers are reimplemented here and measured on the same samples: offline best-fit-decreasing; `greedy_knapsack` from
Megatron-LM's multimodal example over buffers of 1024 samples, as Energon passes them to it (Megatron-LM's examples are
not on any package index, and Energon leaves the choice to its user); and the best method known, a rolling subset-sum
over a window of 128 samples. A wider window does not fill rows better and takes longer. The peers only count rows; ours
also decides which sample goes where.
"""

import bisect
import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
from lengths import mixed_lengths, pair_lengths
from report import Row, describe_versions, parse_arguments, report

from megatron_vlm.data.plan.packing import pack_samples

_BUFFER, _WINDOW = 1024, 128
_ROUNDS = 3
_MAX_MICROSECONDS = 3.0
_CASES = (
    ("COYO", 4096, 0.893),
    ("COYO + MMC4", 4096, 0.940),
    ("COYO", 4224, 0.995),
    ("COYO + MMC4", 4224, 0.972),
)


def count_rows_best_fit(lengths: np.ndarray, seq_length: int) -> int:
    """Return the number of rows of offline best-fit-decreasing, computed on the histogram."""
    counts = np.bincount(lengths, minlength=seq_length + 1)
    gaps = np.zeros(seq_length + 1, dtype=np.int64)
    rows = 0
    for length in np.flatnonzero(counts)[::-1]:
        left = int(counts[length])
        while left:
            fitting = np.flatnonzero(gaps[length:])
            if fitting.size:
                gap = int(length + fitting[0])
                number = min(left, int(gaps[gap]))
                gaps[gap] -= number
            else:
                gap, number = seq_length, max(1, left // (seq_length // int(length)))
                rows += number
            gaps[gap - length] += number
            left -= number
    return rows


def count_rows_knapsack(lengths: np.ndarray, seq_length: int) -> int:
    """Return the number of rows of the greedy knapsack over buffers of 1024 samples: always the longest that fits."""
    rows = 0
    for start in range(0, len(lengths), _BUFFER):
        waiting = sorted(lengths[start : start + _BUFFER].tolist())
        while waiting:
            gap = seq_length
            while (position := bisect.bisect_right(waiting, gap)) > 0:
                gap -= waiting.pop(position - 1)
            rows += 1
    return rows


def count_rows_subset_sum(lengths: np.ndarray, seq_length: int) -> int:
    """Return the number of rows of a rolling subset-sum: the oldest sample and those that best fill its row."""
    stream = iter(lengths.tolist())
    window = list(itertools.islice(stream, _WINDOW))
    rows = 0
    while window:
        room = seq_length - window.pop(0)
        for position in _fill(window, room):
            del window[position]
        window += itertools.islice(stream, _WINDOW - len(window))
        rows += 1
    return rows


def _fill(lengths: list[int], room: int) -> list[int]:
    """Return the positions, last first, of the samples with the largest sum that fits."""
    fits = (1 << room + 1) - 1
    # Bit s of reachable[n]: some of the first n samples add up to s.
    reachable = [1]
    for length in lengths:
        reachable.append((reachable[-1] | reachable[-1] << length) & fits)
        if reachable[-1] >> room:
            break
    left, chosen = reachable[-1].bit_length() - 1, []
    for position in range(len(reachable) - 2, -1, -1):
        if not reachable[position] >> left & 1:
            left -= lengths[position]
            chosen.append(position)
    return chosen


_PEERS: dict[str, Callable[[np.ndarray, int], int]] = {
    "best-fit-decreasing": count_rows_best_fit,
    "Megatron-LM's greedy_knapsack of 1024": count_rows_knapsack,
    "rolling subset-sum of 128": count_rows_subset_sum,
}


def measure(name: str, seq_length: int, required: float, num_samples: int) -> list[Row]:
    """Pack one mix into rows of one length and return utilisation and time."""
    rng = np.random.default_rng(0)
    lengths = pair_lengths(num_samples, rng) if name == "COYO" else mixed_lengths(num_samples, rng, seq_length)
    microseconds = []
    for _ in range(_ROUNDS):
        # The pattern search is cached by histogram; packing other lengths in between clears the cache.
        pack_samples(lengths[: len(lengths) // 2], seq_length, rng)
        pack_samples(lengths[: len(lengths) // 3], seq_length, rng)
        started = time.process_time()
        packed = pack_samples(lengths, seq_length, rng)
        microseconds.append((time.process_time() - started) / len(lengths) * 1e6)
    peer_rows, peer_microseconds = {}, {}
    for peer, count_rows in _PEERS.items():
        started = time.process_time()
        peer_rows[peer] = count_rows(lengths, seq_length)
        peer_microseconds[peer] = (time.process_time() - started) / len(lengths) * 1e6
    positions = lengths.sum(dtype=np.int64) / seq_length
    work = f"{name} in rows of {seq_length}"
    return [
        Row(
            work=work,
            unit="of the positions used",
            ours=float(positions / (len(packed.borders) - 1)),
            peers={peer: float(positions / number) for peer, number in peer_rows.items()},
            required=required,
            judged="at least",
        ),
        Row(
            work=f"{work}, time",
            unit="us per sample",
            ours=float(np.median(microseconds)),
            peers=peer_microseconds,
            required=_MAX_MICROSECONDS,
            judged="at most",
        ),
    ]


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("--samples", type=int, default=1_000_000, help="samples in each mix (default: %(default)s)")

    arguments = parse_arguments(__doc__, add)
    rows = [row for case in _CASES for row in measure(*case, arguments.samples)]
    return report(rows, arguments.json, [describe_versions("numpy")])


if __name__ == "__main__":
    sys.exit(main())
