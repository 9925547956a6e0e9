"""Hooks that a run can be given: each module is one, named by `type` in `training.hooks`, and offers `Config`.

The module of the same name in `training/hooks/` does the work.
"""

from typing import Annotated, Protocol

from megatron_vlm.config.loading import TypeIn


class HookConfig(Protocol):
    """Settings of a hook."""

    @property
    def type(self) -> str:
        """Name of the module."""

    @property
    def package(self) -> str | None:
        """Optional package that it imports, also the name of the extra that installs it; None: it needs none."""


HookSettings = Annotated[HookConfig, TypeIn("megatron_vlm.config.hooks")]
"""Type of a settings field that holds a hook."""
