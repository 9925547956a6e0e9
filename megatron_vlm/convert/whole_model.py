"""What the formats of whole models have in common: the tables of the parts side by side, each with its prefix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.rules import Rule

_Config = TypeVar("_Config")


def refusal(config: _Config, *functions: Callable[[_Config], object]) -> str | None:
    """Return what the first function that refuses the settings says; None if they all take them."""
    try:
        for function in functions:
            function(config)
    except CheckpointError as error:
        return error.what
    return None


def join_rules(tables: Mapping[str, Sequence[Rule]]) -> list[Rule]:
    """Return one table.

    Args:
        tables: of the parts, by the prefix that their names get.
    """
    return [
        replace(
            rule,
            names=tuple(prefix + name for name in rule.names),
            scale=prefix + rule.scale if rule.scale else "",
        )
        for prefix, table in tables.items()
        for rule in table
    ]


def join_patterns(patterns: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the regular expressions of all parts, each with the prefix of its part, whose dots are quoted."""
    return tuple(prefix.replace(".", r"\.") + pattern for prefix, of_part in patterns.items() for pattern in of_part)


def join_renames(prefix: str, renames: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the (regular expression, replacement) pairs of a part for names with its prefix."""
    return [(prefix.replace(".", r"\.") + pattern, prefix + replacement) for pattern, replacement in renames]


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a part by their names with its prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
