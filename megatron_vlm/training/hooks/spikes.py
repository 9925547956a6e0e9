"""Finds steps whose loss or gradient norm is far above those before, and records them with their samples."""

import logging
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.platform.files.events import SPIKE
from megatron_vlm.platform.files.metrics import read_last
from megatron_vlm.training.events import note_event
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)

MIN_VALUES = 20
"""Steps before the first spike that can be found; a shorter window is enough when it is full."""
MIN_SIGMA = 0.01
"""Least standard deviation, as a part of the mean: a flat curve has no spikes of a thousandth."""
_NAMES = ("loss", "grad_norm")


@dataclass(frozen=True, slots=True)
class Spike:
    """A value above `mean + training.spike_sigmas * sigma` of the values before it."""

    value: float
    mean: float
    sigma: float


class SpikeFinder:
    """Compares each value of a curve with the last ones.

    A spike counts as a value at the bound in what follows: one outlier does not hide the next, and after a lasting
    change the bound comes after.

    Args:
        sigmas: standard deviations between the mean and the bound.
        window: values that are looked back at.
    """

    def __init__(self, sigmas: float, window: int) -> None:
        self.sigmas = sigmas
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> Spike | None:
        """Take the next value; return it with what it was compared with if it is a spike."""
        count, spike = len(self._values), None
        if count >= min(MIN_VALUES, self._values.maxlen or MIN_VALUES):
            mean = math.fsum(self._values) / count
            variance = math.fsum((one - mean) ** 2 for one in self._values) / count
            sigma = max(math.sqrt(variance), MIN_SIGMA * abs(mean))
            bound = mean + self.sigmas * sigma
            if value > bound:
                spike, value = Spike(value, mean, sigma), bound
        self._values.append(value)
        return spike


class Hook:
    """Looks at every step on the reporting rank; comes after the hook that cuts lost steps off the metrics file."""

    def __init__(self) -> None:
        self._finders: dict[str, SpikeFinder] = {}

    def start(self, state: TrainState) -> None:
        """Take the values of the last iterations done."""
        training = state.config.training
        if not state.is_reporter or training.spike_sigmas is None:
            return
        self._finders = {name: SpikeFinder(training.spike_sigmas, training.spike_window) for name in _NAMES}
        # In a window before the last one, values found to be spikes get their bound.
        for record in read_last(Path(state.config.run_dir), 2 * training.spike_window):
            if record.get("loss") is None:
                continue
            for name, finder in self._finders.items():
                value = record.get(name)
                if record["iteration"] <= state.iteration and isinstance(value, float):
                    finder.add(value)

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Warn of a spike, and record it with the ids of the samples of the step."""
        if metrics.loss is None:
            return  # without labels there is no gradient either, and a norm of 0 is not to be compared with
        for name, finder in self._finders.items():
            spike = finder.add(getattr(metrics, name))
            if spike is None:
                continue
            what = (
                f"{name} {spike.value:.4g} at iteration {state.iteration} is "
                f"{(spike.value - spike.mean) / spike.sigma:.1f} standard deviations above the mean {spike.mean:.4g}"
            )
            logger.warning("%s; train --replay %d gives the loss of each sample", what, state.iteration)
            sample_ids = state.plan.sample_ids(state.iteration - 1).tolist()
            details = {"name": name, "value": spike.value, "mean": spike.mean, "sigma": spike.sigma}
            note_event(state, SPIKE, what, **details, sample_ids=sample_ids)

    def close(self, state: TrainState) -> None:
        """Nothing to release."""
