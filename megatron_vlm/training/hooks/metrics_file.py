"""Writes metrics.jsonl of a run, one line for each iteration."""

import json
from pathlib import Path
from typing import TextIO

from megatron_vlm.platform.files.metrics import PastRecords
from megatron_vlm.platform.files.run_folder import METRICS_NAME
from megatron_vlm.training.metrics import metrics_record
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics


class Hook:
    """Appends to metrics.jsonl on the reporting rank; lines after the resumed iteration are replaced."""

    def __init__(self) -> None:
        self._stream: TextIO | None = None

    def start(self, state: TrainState) -> None:
        """Open the file and remove lines after the resumed iteration."""
        if not state.is_reporter:
            return
        path = Path(state.config.run_dir) / METRICS_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        (state.past_records or PastRecords(path, state.iteration)).drop_lost()
        state.past_records = None
        self._stream = path.open("a")

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Append one line; it survives the death of the process once the call returns."""
        if self._stream is not None:
            self._stream.write(json.dumps(metrics_record(state, metrics)) + "\n")
            self._stream.flush()

    def close(self, state: TrainState) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
