"""Checks used by the settings of several sections."""

from typing import Any

from megatron_vlm.config.errors import ConfigError, UsageError


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
