"""Traces of chosen iterations, to be looked at in Perfetto or chrome://tracing."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_vlm.config.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which iterations are traced, and on which ranks."""

    package: ClassVar[str | None] = None
    type: Literal["profiler"] = "profiler"
    iterations: tuple[int, ...]
    """Counted from 1; the first ones of a run are slower than the others."""
    ranks: tuple[int, ...] = (0,)
    record_shapes: bool = False
    """Keep the shapes of the inputs of every operation."""
    with_stack: bool = False
    """Keep the Python stack of every operation; makes the iteration slower."""

    def __post_init__(self) -> None:
        if not self.iterations or min(self.iterations) < 1:
            raise ConfigError(
                f"the profiler's iterations {list(self.iterations)} are not counted from 1", fix="name at least one"
            )
        if not self.ranks or min(self.ranks) < 0:
            raise ConfigError(f"the profiler's ranks {list(self.ranks)} do not exist", fix="name ranks from 0 on")
