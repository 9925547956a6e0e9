"""Where the reading of a dataset stands after a part of a plan, and how it goes on, pass by pass.

A plan shuffles a whole pass over the blend before it cuts it into rows. Where the blend changes inside a pass, some
samples of every dataset are left over, anywhere in their order. They come first afterwards, then the rest of their
pass, then the next one: so no sample is read again before all others of its dataset were.
"""

from collections.abc import Sequence

import numpy as np

from megatron_vlm.data.plan.blend import order_of_epoch, read_in_epochs


class SourceReader:
    """Reads a dataset on, as far as its present pass reaches.

    Args:
        ids: int64[n]; global ids of its samples.
        seed: of the order of its passes, as in `read_in_epochs`.
    """

    def __init__(self, ids: np.ndarray, seed: Sequence[int]) -> None:
        self.ids, self.seed = ids, seed
        self._next_epoch = 0
        self._passes: list[np.ndarray] = []
        """What is left of passes that have begun, in reading order."""
        self._has_ended = False
        """Whether the last `take` was the end of a pass."""

    @classmethod
    def after(
        cls, ids: np.ndarray, seed: Sequence[int], window: tuple[int, int], consumed: np.ndarray
    ) -> "SourceReader":
        """Return the reader of a dataset of which all before a window was consumed, and a part of the window.

        Args:
            ids: as in the class.
            seed: as in the class.
            window: begin and end in the endless reading of `read_in_epochs`.
            consumed: int64[ids of all datasets]; how often each sample of the window was consumed.
        """
        (start, stop), reader = window, cls(ids, seed)
        found = ids[read_in_epochs(len(ids), start, stop, seed)]
        is_left = _occurrences(found) >= consumed[found]
        epochs = np.arange(start, stop) // len(ids)
        reader._passes = [found[is_left & (epochs == epoch)] for epoch in np.unique(epochs)]
        reader._next_epoch = -(-stop // len(ids))
        if begun := stop % len(ids):
            rest = ids[order_of_epoch(len(ids), stop // len(ids), seed)[begun:]]
            reader._passes.append(np.concatenate([reader._passes.pop() if len(found) else rest[:0], rest]))
        reader._passes = [left for left in reader._passes if len(left)]
        return reader

    def left(self) -> int:
        """Return how many samples the present pass still has, at least one."""
        if not self._passes:
            self._passes.append(self.ids[order_of_epoch(len(self.ids), self._next_epoch, self.seed)])
            self._next_epoch += 1
        return len(self._passes[0])

    def take(self, number: int) -> np.ndarray:
        """Return the next samples of the present pass, at most `left()`, as global ids."""
        taken, rest = np.split(self._passes[0], [number])
        self._has_ended = not len(rest)
        if self._has_ended:
            del self._passes[0]
        else:
            self._passes[0] = rest
        return taken

    def give_back(self, ids: np.ndarray) -> None:
        """Put samples of the last `take`, in their order, back in front."""
        if self._has_ended:
            self._passes.insert(0, ids)
        else:
            self._passes[0] = np.concatenate([ids, self._passes[0]])
        self._passes = [left for left in self._passes if len(left)]


def _occurrences(ids: np.ndarray) -> np.ndarray:
    """Return how many equal ids stand before each."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(ids)]
    firsts = np.flatnonzero(is_first)
    result = np.empty(len(ids), dtype=np.int64)
    result[order] = np.arange(len(ids)) - firsts[np.cumsum(is_first) - 1] if len(ids) else ()
    return result
