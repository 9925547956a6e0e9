"""Saves checkpoints at their interval and before the run ends, and tries again where a save fails."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from megatron_vlm.checkpoint.background import BackgroundSaves
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import StorageError
from megatron_vlm.platform.files.events import FAILED_SAVE, SAVE
from megatron_vlm.platform.launch.heartbeat import Phase, beat
from megatron_vlm.training.events import note_event
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)
_SECONDS_BEFORE_RETRY = 2.0
"""At the end of the run, where no step passes the time."""


class Hook:
    """Saves on all ranks together; comes after the hooks that set `state.stop_reason`, to save an early end."""

    def __init__(self) -> None:
        self._background: BackgroundSaves | None = None
        self._num_failed = 0
        """Saves in a row; the same on every rank."""
        self._retry_at: int | None = None
        """Iteration after which a failed save is repeated."""
        self._held, self._entered = 0.0, 0.0
        """Seconds that the steps had to wait since the last save ended; when this hook was called."""

    def start(self, state: TrainState) -> None:
        """Prepare for asynchronous saves."""
        if state.config.checkpoint.async_save:
            self._background = BackgroundSaves()

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Save a checkpoint if one is due, and look after the one in flight.

        Raises:
            StorageError: `checkpoint.max_failed_saves` saves in a row have failed.
            NumericError: weights or moments are not finite.
        """
        self._entered = time.perf_counter()
        self._save_if_due(state)
        self._held += time.perf_counter() - self._entered

    def close(self, state: TrainState) -> None:
        """Let the save in flight finish: after an error of the run, it is the newest valid state."""
        beat(Phase.SAVE)
        self._entered = time.perf_counter()
        if self._background is not None:
            path = self._background.wait()
            if path is not None:
                self._note_success(state, path)

    def _save_if_due(self, state: TrainState) -> None:
        ends = state.stop_reason is not None or state.iteration == state.train_iters
        due = ends or state.iteration == self._retry_at or state.iteration % state.config.checkpoint.save_interval == 0
        if due:
            beat(Phase.SAVE)
        if self._background is not None:
            self._attempt(state, self._background.wait if due else self._background.poll)
        if not due:
            return
        state.gather_parameters()
        what = (state.config, state.chunks, state.optimizer, state.progress(), state.base)
        if self._background is not None and not ends:
            self._background.start(*what)
            return
        while not self._attempt(state, lambda: save_checkpoint(*what)) and ends:
            time.sleep(_SECONDS_BEFORE_RETRY)
            beat()

    def _attempt(self, state: TrainState, save: Callable[[], Path | None]) -> bool:
        """Save, or learn how a save has ended; return whether none failed."""
        try:
            path = save()
        except StorageError as error:
            self._note_failure(state, error)
            return False
        if path is not None:
            self._num_failed, self._retry_at = 0, None
            self._note_success(state, path)
        return True

    def _note_success(self, state: TrainState, path: Path) -> None:
        if state.is_reporter:
            logger.info("saved checkpoint %s", path)
        note_event(state, SAVE, f"saved {path.name}", seconds=self._take_seconds())

    def _take_seconds(self) -> float:
        """Return how long the steps had to wait since the last save ended."""
        now = time.perf_counter()
        seconds, self._held, self._entered = self._held + now - self._entered, 0.0, now
        return seconds

    def _note_failure(self, state: TrainState, error: StorageError) -> None:
        settings = state.config.checkpoint
        self._num_failed += 1
        if self._num_failed >= settings.max_failed_saves:
            what = f"{self._num_failed} saves in a row failed, the last: " if self._num_failed > 1 else ""
            raise StorageError(what + error.what, where=error.where, fix=error.fix) from error
        self._retry_at = state.iteration + max(1, settings.save_interval // 10)
        note_event(state, FAILED_SAVE, str(error), seconds=self._take_seconds())
        if state.is_reporter:
            left = settings.max_failed_saves - self._num_failed
            logger.warning("%s; the run goes on, and ends if the next %d saves fail, too", error, left)
