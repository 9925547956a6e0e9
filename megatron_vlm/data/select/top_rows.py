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
        self._k, self._capacity = k, k + max(k // 4, _MIN_SPARE_ROWS)
        self._scores, self._rows = [np.zeros(0, dtype=dtype)], [np.zeros(0, dtype=np.int64)]
        self._size = 0
        self._threshold: np.generic | None = None

    def add(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Offer finite scores [n] with their row numbers, int64[n], which ascend from call to call."""
        if self._threshold is not None:
            better = scores > self._threshold  # a row equal to the k-th comes after it, so it is not kept
            scores, rows = scores[better], rows[better]
        self._scores.append(scores)
        self._rows.append(rows)
        self._size += len(scores)
        if self._size >= self._capacity:
            self._compact()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores and row numbers that are kept, by row number."""
        self._compact()
        return self._scores[0], self._rows[0]

    def _compact(self) -> None:
        """Drop all but the k best, which stay in the order of their rows."""
        self._scores, self._rows = [np.concatenate(self._scores)], [np.concatenate(self._rows)]
        if self._size <= self._k:
            return
        scores = self._scores[0]
        self._threshold = np.partition(scores, self._size - self._k)[self._size - self._k]
        keep = scores > self._threshold
        equal = np.flatnonzero(scores == self._threshold)
        keep[equal[: self._k - int(keep.sum())]] = True
        self._scores, self._rows, self._size = [scores[keep]], [self._rows[0][keep]], self._k
