"""Writes the numbers of each iteration for TensorBoard, into the run folder."""

from pathlib import Path
from typing import Any

from megatron_vlm.platform.files.run_folder import TENSORBOARD_FOLDER
from megatron_vlm.training.metrics import metrics_record, scalars
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics


class Hook:
    """Writes event files on the reporting rank; a resume hides earlier events after the resumed iteration."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, state: TrainState) -> None:
        """Open an event file."""
        if state.is_reporter:
            from torch.utils.tensorboard import SummaryWriter

            folder = Path(state.config.run_dir) / TENSORBOARD_FOLDER
            self._writer = SummaryWriter(str(folder), purge_step=state.iteration + 1)

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Write every number of the iteration's record."""
        if self._writer is not None:
            for key, value in scalars(metrics_record(state, metrics)).items():
                self._writer.add_scalar(key, value, state.iteration)

    def close(self, state: TrainState) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
