"""Checks used by the settings of several sections."""

import os
from typing import Any

from megatron_vlm.config.errors import ConfigError, UsageError

_MAX_PATH, _MAX_PATH_PART = 4096, 255
"""Bytes of a path with its final zero, and of a name in it, that Linux allows."""
_MAX_SIZES = {
    "num_layers": 10_000,
    "hidden_size": 2**18,
    "ffn_hidden_size": 2**21,
    "num_attention_heads": 2**14,
    "kv_channels": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
    "image_size": 2**14,
}
"""An order of magnitude or more above published models."""


def check_positive(section: str, config: Any, *names: str) -> None:
    """Check that the named fields are positive; None passes.

    Raises:
        ConfigError: a field is 0 or less.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{section}.{name}={value} is not positive", fix="use a number above 0")


def check_not_negative(section: str, config: Any, *names: str) -> None:
    """Check that the named fields are not negative; None passes.

    Raises:
        ConfigError: a field is below 0.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ConfigError(f"{section}.{name}={value} is negative", fix="use 0 or more")


def check_at_most(section: str, config: Any, most: float, *names: str) -> None:
    """Check that the named fields are not above `most`, which no machine of today could run; None passes.

    Raises:
        ConfigError: a field is above it.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value > most:
            raise ConfigError(f"{section}.{name}={value} is above {most}", fix=f"use {most} or less")


def check_sizes(section: str, config: Any) -> None:
    """Check the sizes of a transformer that `config` has against `_MAX_SIZES`; None passes.

    Raises:
        ConfigError: a size is above its limit.
    """
    for name, most in _MAX_SIZES.items():
        if hasattr(config, name):
            check_at_most(section, config, most, name)


def check_path(key: str, value: str | None) -> None:
    """Check that a path can exist; None passes.

    Raises:
        ConfigError: it is empty, or too long for a file system.
    """
    if value is None:
        return
    if not value.strip():
        raise ConfigError(f"{key} is empty", fix=f"set {key} to a path")
    longest = max(len(os.fsencode(part)) for part in value.split("/"))
    if len(os.fsencode(value)) >= _MAX_PATH or longest > _MAX_PATH_PART:
        raise ConfigError(
            f"{key}={value[:50]}... of {len(value)} characters is too long for a path", fix="choose a shorter one"
        )


def check_order(least_flag: str, least: float, most_flag: str, most: float) -> None:
    """Check that a lower limit does not exceed the upper limit.

    Raises:
        UsageError: it does.
    """
    if least > most:
        raise UsageError(f"{least_flag} {least} is above {most_flag} {most}", fix="lower one or raise the other")


def check_heads(section: str, hidden_size: int, num_attention_heads: int, kv_channels: int | None) -> None:
    """Check that the width is a multiple of the number of heads, unless `kv_channels` sets the head size.

    Raises:
        ConfigError: the heads do not divide the width.
    """
    if kv_channels is None and hidden_size % num_attention_heads:
        raise ConfigError(
            f"{section}.hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}",
            fix="choose a multiple, or set kv_channels",
        )
