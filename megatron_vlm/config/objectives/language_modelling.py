"""Next-token prediction."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Cross-entropy of the tokens that are trained on, each with the same weight."""

    type: Literal["language_modelling"] = "language_modelling"
