"""Objectives of training: each module is one, named in `training.objective.type`, and offers the dataclass `Config`.

The module of the same name in `training/objectives/` computes it.
"""

from typing import Annotated, Protocol

from megatron_vlm.config.loading import TypeIn


class ObjectiveConfig(Protocol):
    """Settings of an objective."""

    @property
    def type(self) -> str:
        """Name of the module."""


Objective = Annotated[ObjectiveConfig, TypeIn("megatron_vlm.config.objectives", default="language_modelling")]
"""Type of a settings field that holds an objective."""
