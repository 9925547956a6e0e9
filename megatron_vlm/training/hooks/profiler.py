"""Writes a trace of each chosen iteration into the run folder: `profile/iteration_0000010_rank_00000.json`."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_vlm.config import ConfigError
from megatron_vlm.config.hooks.profiler import Config
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

PROFILE_FOLDER = "profile"
logger = logging.getLogger(__name__)


class Hook:
    """Traces from the end of the iteration before a chosen one to its own end, on the chosen ranks."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._running: profile | None = None

    def start(self, state: TrainState) -> None:
        """Start tracing if the next iteration is chosen.

        Raises:
            ConfigError: the job has no such rank.
        """
        if max(self.config.ranks) >= state.rank.world_size:
            raise ConfigError(
                f"the profiler's ranks {list(self.config.ranks)} do not all exist",
                fix=f"name ranks from 0 to {state.rank.world_size - 1}",
            )
        self._begin(state)

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Write the trace of the iteration just done, and start the next one if it is chosen."""
        if self._running is not None:
            folder = Path(state.config.run_dir) / PROFILE_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"iteration_{state.iteration:07d}_rank_{state.rank.rank:05d}.json"
            self._end().export_chrome_trace(str(path))
            logger.info("wrote the trace of iteration %d to %s", state.iteration, path)
        self._begin(state)

    def close(self, state: TrainState) -> None:
        """Stop tracing; an unfinished iteration leaves no trace."""
        if self._running is not None:
            self._end()

    def _begin(self, state: TrainState) -> None:
        if state.iteration + 1 not in self.config.iterations or state.rank.rank not in self.config.ranks:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(
            activities=activities, record_shapes=self.config.record_shapes, with_stack=self.config.with_stack
        )
        self._running.start()

    def _end(self) -> profile:
        assert self._running is not None
        finished, self._running = self._running, None
        finished.stop()
        return finished
