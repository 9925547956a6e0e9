"""Records which samples each iteration consumed, in the run folder."""

from pathlib import Path

from megatron_vlm.data.plan.ledger import Ledger
from megatron_vlm.platform.files.run_folder import LEDGER_FOLDER
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics


class Hook:
    """Writes the ledger on the reporting rank."""

    def __init__(self) -> None:
        self._ledger: Ledger | None = None

    def start(self, state: TrainState) -> None:
        """Open the ledger and remove entries after the resumed iteration."""
        if state.is_reporter:
            self._ledger = Ledger(Path(state.config.run_dir) / LEDGER_FOLDER, state.plan, state.iteration)

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Append the iteration."""
        if self._ledger is not None:
            self._ledger.record(state.iteration, metrics.sample_ids_sha)

    def close(self, state: TrainState) -> None:
        """Close the files."""
        if self._ledger is not None:
            self._ledger.close()
