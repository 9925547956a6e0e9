"""Checks that several sections share."""

from typing import Any

from megatron_vlm.config.errors import ConfigError


def check_positive(section: str, config: Any, *names: str) -> None:
    """Check that the named fields are above 0 where they are set.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{section}.{name}={value} is not positive", fix="use a number above 0")


def check_not_negative(section: str, config: Any, *names: str) -> None:
    """Check that the named fields are 0 or more where they are set.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ConfigError(f"{section}.{name}={value} is negative", fix="use 0 or more")
