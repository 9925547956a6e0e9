"""Hooks: everything a run does beside the step. A hook starts, acts after every step, and closes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from megatron_vlm.config.hooks import HookConfig
from megatron_vlm.config.modules import find_module
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

_PACKAGE = "megatron_vlm.training.hooks"
logger = logging.getLogger(__name__)


class Hook(Protocol):
    """One concern beside the step. Every rank runs it; hooks that only write do so on the reporting rank."""

    def start(self, state: TrainState) -> None:
        """Prepare, before the first step."""

    def step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Act on the step just done, which `state.iteration` already counts."""

    def close(self, state: TrainState) -> None:
        """Release resources; also called after an error."""


def build_hooks(configs: Sequence[HookConfig]) -> list[Hook]:
    """Return the hooks that the settings name.

    Raises:
        ConfigError: there is no such hook.
    """
    modules: list[Any] = [find_module(_PACKAGE, config.type, "training.hooks type") for config in configs]
    return [module.Hook(config) for module, config in zip(modules, configs, strict=True)]


@contextmanager
def running(hooks: Sequence[Hook], state: TrainState) -> Iterator[None]:
    """Start hooks in order, and close those that started in reverse order, whatever happens.

    The first error is raised; errors that follow while hooks close are logged.
    """
    started: list[Hook] = []
    first: BaseException | None = None
    try:
        for hook in hooks:
            hook.start(state)
            started.append(hook)
        yield
    except BaseException as error:
        first = error
    for hook in reversed(started):
        try:
            hook.close(state)
        except Exception as error:
            if first is None:
                first = error
            else:
                logger.warning("%s could not be closed: %s", type(hook).__module__, error)
    if first is not None:
        raise first
