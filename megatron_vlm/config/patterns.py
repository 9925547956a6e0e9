"""Patterns that choose parameters of the model by name, as in `training.freeze`.

A parameter is named as in the built model, with its part in front and decoder layers counted from 0 over all pipeline
stages: `language_model.decoder.layers.17.mlp.linear_fc1.weight`. The names are the same for every layout and backend.
A pattern is a shell pattern (Python's `fnmatch`; `*` also stands for dots) for the name of a parameter, or of a module
that contains it: `vision_model`, `language_model.decoder.layers.[0-3]`, `*.mlp.*`, `*layernorm.weight`.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.language import LanguageConfig
from megatron_vlm.config.model import PART_NAMES, ModelConfig
from megatron_vlm.config.parameter_sizes import prefixed
from megatron_vlm.config.projectors import ProjectorConfig
from megatron_vlm.config.towers import TowerConfig


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern chooses the parameter of this name."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Return whether one of the patterns chooses the parameter of this name."""
    return any(matches(pattern, name) for pattern in patterns)


def parameter_sizes(model: ModelConfig) -> dict[str, int]:
    """Return the size of every parameter of the model without its adapter, in the order of the forward pass.

    Sizes are those of one rank that holds everything; the result is shared, so do not change it.
    """
    # The protocols do not say that settings are frozen dataclasses, which can be hashed; a test does.
    return _parameter_sizes(model.vision, model.projection, model.language)  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def _parameter_sizes(vision: TowerConfig, projection: ProjectorConfig, language: LanguageConfig) -> dict[str, int]:
    sizes = projection.parameter_sizes(vision.feature_size, language.hidden_size)
    by_part = zip(PART_NAMES, (vision.parameter_sizes, sizes, language.parameter_sizes), strict=True)
    return {name: size for part, inside in by_part for name, size in prefixed(part, inside).items()}


def adapter_names(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of the parameters that the adapter adds; none without one."""
    adapter = model.adapter
    if adapter is None:
        return ()
    return tuple(f"{part}.{name}" for part in adapter.parts for name in adapter.parameter_names(model, part))


def check_patterns(setting: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    """Check that every pattern chooses a parameter.

    Args:
        setting: dotted name of the setting, for the error.
        patterns: of the setting.
        names: of all parameters of the model.

    Raises:
        ConfigError: one chooses none; names it, and the closest module.
    """
    found = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in found):
            modules = {".".join(name.split(".")[:depth]) for name in found for depth in range(1, name.count(".") + 2)}
            guess = difflib.get_close_matches(pattern, sorted(modules), n=1, cutoff=0.5)
            example = f"did you mean {guess[0]}" if guess else f"names are like {found[-1]}"
            raise ConfigError(f"{setting}: {pattern!r} matches no parameter of the model", fix=example)
