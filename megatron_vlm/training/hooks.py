"""What happens beside the step: logs, checkpoints, the ledger, and the reasons to stop."""

import logging

from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.data.plan.ledger import Ledger
from megatron_vlm.training.metrics import MetricsWriter, log_line, metrics_record
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)

SIGNALLED = "signalled"
EXIT_ITERATION = "exit_iteration"


class LogHook:
    """Writes metrics.jsonl, TensorBoard and the log line; on the reporting rank only.

    Args:
        writer: of this run.
        ledger: of this run.
    """

    def __init__(self, writer: MetricsWriter, ledger: Ledger) -> None:
        self.writer, self.ledger = writer, ledger

    def __call__(self, state: TrainState, metrics: StepMetrics) -> None:
        """Write one iteration."""
        self.ledger.record(state.iteration, metrics.sample_ids_sha)
        record = metrics_record(state, metrics)
        self.writer.write(record)
        if state.iteration % state.config.training.log_interval == 0 or state.iteration == state.train_iters:
            logger.info(log_line(record, state.train_iters))


def stop_hook(state: TrainState, metrics: StepMetrics) -> None:
    """Decide, alike on every rank, whether the run ends after this step."""
    if metrics.stop_requested:
        state.stop_reason = SIGNALLED
    elif state.iteration == state.config.training.exit_iteration:
        state.stop_reason = EXIT_ITERATION


def save_hook(state: TrainState, metrics: StepMetrics) -> None:
    """Save a checkpoint when one is due; stands after `stop_hook`, so that an early end is saved too."""
    due = state.iteration % state.config.checkpoint.save_interval == 0
    if due or state.stop_reason is not None or state.iteration == state.train_iters:
        path = save_checkpoint(state.config, state.chunks, state.optimizer, state.progress())
        if state.is_reporter:
            logger.info("saved checkpoint %s", path)
