"""The k best rows of a stream, exactly and in bounded memory."""

import numpy as np

_MIN_SPARE_ROWS = 1 << 16


class TopRows:
    """The k highest scores of a stream, each with its row number; memory is bounded by k, not by the stream.

    Args:
        k: number of rows to keep; of equal scores, the first ones are kept.
        dtype: type of the scores.
    """

    def __init__(self, k: int, dtype: type[np.generic] = np.float64) -> None:
        self._k, self._size = k, 0
        self._capacity = k + max(k // 4, _MIN_SPARE_ROWS)
        self._scores, self._rows = np.zeros(0, dtype=dtype), np.zeros(0, dtype=np.int64)
        self._threshold: np.generic | None = None

    def add(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Offer finite scores [n] with their row numbers, int64[n], which ascend from call to call."""
        if self._threshold is not None:
            better = scores > self._threshold  # a row equal to the k-th comes after it, so it is not kept
            scores, rows = scores[better], rows[better]
        while len(scores):
            count = min(len(scores), self._capacity - self._size)
            self._grow(self._size + count)
            self._scores[self._size : self._size + count] = scores[:count]
            self._rows[self._size : self._size + count] = rows[:count]
            self._size += count
            scores, rows = scores[count:], rows[count:]
            if self._size == self._capacity:
                self._compact()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores and row numbers that are kept, by row number."""
        self._compact()
        return self._scores[: self._size], self._rows[: self._size]

    def _grow(self, wanted: int) -> None:
        if wanted > len(self._scores):
            size = min(self._capacity, max(wanted, 2 * len(self._scores)))
            self._scores, self._rows = (
                np.concatenate([old[: self._size], np.zeros(size - self._size, dtype=old.dtype)])
                for old in (self._scores, self._rows)
            )

    def _compact(self) -> None:
        """Drop all but the k best, which stay in the order of their rows."""
        if self._size <= self._k:
            return
        scores, rows = self._scores[: self._size], self._rows[: self._size]
        self._threshold = np.partition(scores, self._size - self._k)[self._size - self._k]
        keep = scores > self._threshold
        equal = np.flatnonzero(scores == self._threshold)
        keep[equal[: self._k - int(keep.sum())]] = True
        self._scores[: self._k], self._rows[: self._k] = scores[keep], rows[keep]
        self._size = self._k
