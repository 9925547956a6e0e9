"""What one played rank did and held. Needs no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.platform.fake_device.events import Collective, HostWait

BUILD, STEP, UPDATE = "build", "forward and backward", "optimizer"
"""Phases of a run, by which the memory is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """One rank of a rehearsal; memory in bytes, waits and collectives of the last iteration that was played."""

    rank: int
    pp_rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    parameters: int
    learning: int
    """Parameters that learn."""
    weights: int
    gradients: int
    optimizer: int
    peaks: dict[str, int]
    """Most memory held at once, by phase, over all iterations."""
    waits: Counter[HostWait]
    """Of a whole step."""
    collectives: Sequence[Collective]
    """Of the micro-batches played, in order."""
    image_counts: tuple[int, ...]
    """Images of each micro-batch played."""
    label_counts: tuple[int, ...]
    """Positions with a loss of each micro-batch played."""
    checkpoint: int
    """What this rank writes of a checkpoint, at most."""

    @property
    def peak(self) -> int:
        """Most memory held at once [bytes]."""
        return max(self.peaks.values())

    @property
    def activations(self) -> int:
        """Memory at the peak of the micro-batches beyond weights, gradients and optimizer, temporaries included."""
        return self.peaks[STEP] - self.weights - self.gradients - self.optimizer
