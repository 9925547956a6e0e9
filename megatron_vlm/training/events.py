"""Record what happens to a run beside its steps; every rank may call it, the one that reports writes."""

from typing import Any

from megatron_vlm.platform.files.events import record_event
from megatron_vlm.training.state import TrainState


def note_event(state: TrainState, kind: str, what: str, **details: Any) -> None:
    """Record an event of the present iteration in the run folder.

    Args:
        state: of the run.
        kind: one word, such as those of `platform.files.events.KINDS`.
        what: one line for people.
        **details: plain values for programs.
    """
    if state.is_reporter:
        record_event(state.config.run_dir, kind, what, iteration=state.iteration, **details)
