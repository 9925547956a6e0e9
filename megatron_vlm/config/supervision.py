"""How long a rank may be silent before the launcher ends the job."""

from dataclasses import dataclass

from megatron_vlm.config.checks import check_at_most, check_positive

_MAX_MINUTES = 100_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionConfig:
    """Limits of silence [minutes], counted from the last sign of life of a rank.

    A rank gives one at every micro-batch of a step or a validation, between the parts of its set-up, and every few
    seconds while it, or a rank that it waits for, writes a checkpoint or compares one with its manifest: the limits are
    not those of whole steps or saves.
    """

    meeting_minutes: float = 2.0
    """On several nodes, until the launcher of each has come up; after half of it, one line names those that are
    missing. More if an image for containers takes nodes minutes to unpack."""
    setup_minutes: float = 60.0
    """Until the first step: meeting of the ranks, plan, model, reading of a checkpoint into the model."""
    first_step_minutes: float = 30.0
    """Per micro-batch of the first step and of the first batch of a validation: loaders start, kernels are compiled."""
    step_minutes: float | None = None
    """Per micro-batch of all other steps; None: 10 times the longest silence in a step so far, at least 0.8 of
    `parallel.distributed_timeout_minutes`, so that the rank that hangs is found before those give up that wait for
    it."""
    save_minutes: float = 30.0
    """Of a save, in which nothing is written meanwhile, and of the end of the run. While an asynchronous save is
    written, steps go on with their own limit, and signs of the writer count only where the steps wait for it."""

    def __post_init__(self) -> None:
        names = ("meeting_minutes", "setup_minutes", "first_step_minutes", "step_minutes", "save_minutes")
        check_positive("supervision", self, *names)
        check_at_most("supervision", self, _MAX_MINUTES, *names)
