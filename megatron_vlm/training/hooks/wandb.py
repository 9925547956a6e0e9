"""Reports the numbers of each iteration to Weights & Biases, under the names that TensorBoard shows."""

import uuid
from pathlib import Path
from typing import Any

from megatron_vlm.config import config_to_dict
from megatron_vlm.config.hooks.wandb import Config
from megatron_vlm.platform.machine import check_package
from megatron_vlm.training.metrics import metrics_record, scalars
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

ID_FILE = "wandb_id"


class Hook:
    """Reports on the reporting rank; a resumed run continues under the same id, which is kept in the run folder."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._run: Any = None

    def start(self, state: TrainState) -> None:
        """Open the run, or continue it.

        Raises:
            ConfigError: the package is not installed.
        """
        check_package(self.config)
        if not state.is_reporter:
            return
        import wandb

        run_dir = Path(state.config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            name=self.config.name or run_dir.resolve().name,
            mode=self.config.mode,
            dir=str(run_dir),
            id=_run_id(run_dir / ID_FILE),
            resume="allow",
            config=config_to_dict(state.config),
        )

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Report one iteration; W&B ignores iterations it already has, which a resumed run may repeat."""
        if self._run is not None:
            self._run.log(scalars(metrics_record(state, metrics)), step=state.iteration)

    def close(self, state: TrainState) -> None:
        """Send the remaining data."""
        if self._run is not None:
            self._run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
