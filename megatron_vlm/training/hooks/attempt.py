"""Records that an attempt begins and which steps of the one before it does again; counts what goodput is told from."""

import time
from pathlib import Path

from megatron_vlm.platform.files.events import BEGIN, DAMAGED, read_events
from megatron_vlm.platform.files.metrics import PastRecords, last_of_each_iteration
from megatron_vlm.platform.files.run_folder import METRICS_NAME
from megatron_vlm.training.events import note_event
from megatron_vlm.training.goodput import Goodput, first_start, seconds_in_steps
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics


class Hook:
    """Sets `state.goodput` on the reporting rank; comes before the hooks that cut lost steps off or write metrics."""

    def start(self, state: TrainState) -> None:
        """Record the beginning; metrics.jsonl still has the steps after the resumed iteration."""
        if not state.is_reporter:
            return
        state.past_records = PastRecords(Path(state.config.run_dir) / METRICS_NAME, state.iteration)
        lost, kept = map(last_of_each_iteration, (state.past_records.lost, state.past_records.kept))
        details = {"lost_iterations": len(lost), "lost_seconds": seconds_in_steps(lost)}
        if lost and "unix_time" in lost[-1]:
            details["lost_until"] = lost[-1]["unix_time"]
        what = f"resumed after iteration {state.iteration:,}" if state.iteration else "began"
        if lost:
            what += f"; {len(lost)} steps after it are done again"
        now = time.time()
        note_event(state, BEGIN, what, **details)
        for name, fault in state.damaged_checkpoints.items():
            note_event(state, DAMAGED, f"{name} is damaged and was passed over: {fault}", checkpoint=name)
        events, _ = read_events(state.config.run_dir)
        state.goodput = Goodput(first_start(events, default=now), seconds_in_steps(kept))

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Count the step."""
        if state.goodput is not None:
            state.goodput.seconds_in_steps += metrics.seconds

    def close(self, state: TrainState) -> None:
        """Nothing to release: the launcher records the end."""
