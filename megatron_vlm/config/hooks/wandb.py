"""Curves in Weights & Biases."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Where the run is reported; the API key is taken from the environment or from `wandb login`."""

    package: ClassVar[str | None] = "wandb"
    type: Literal["wandb"] = "wandb"
    project: str
    entity: str | None = None
    """User or team; None: the default of the account."""
    name: str | None = None
    """Name of the run; None: its folder."""
    mode: Literal["online", "offline"] = "online"
    """offline: write into the run folder, for `wandb sync` from a machine with a network."""
