"""How two models differ: in their settings, and in names and shapes of their tensors."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.towers import innermost
from megatron_vlm.convert.family import find_tower_family

_SHOWN = 3
# Fields that a training may choose freely: they affect neither a tensor nor what imported weights compute.
_FREE_LANGUAGE = {"init_method_std", "max_position_embeddings"}
_HEADS = {"num_query_groups": "query_groups", "kv_channels": "head_channels"}
"""Fields that may be None, and the properties that they stand for."""


def different_settings(
    first: ModelConfig, second: ModelConfig, *, only_what_runs: bool = False
) -> list[tuple[str, Any, Any]]:
    """Return key and both values of each setting of decoder and tower that changes what the weights compute.

    Args:
        first: a model.
        second: another one; its tower says which settings a training may choose.
        only_what_runs: of layers of the tower, count those before the features are taken.
    """
    towers = innermost(first.vision), innermost(second.vision)
    layers = {"num_layers": "num_layers_run"} if only_what_runs else {}
    return [
        *_different_fields("model.language", first.language, second.language, _FREE_LANGUAGE, _HEADS),
        *_different_fields("model.vision", *towers, find_tower_family(towers[1].type).FREE, layers),
    ]


def _different_fields(
    section: str, first: Any, second: Any, free: Collection[str], derived: Mapping[str, str]
) -> Iterator[tuple[str, Any, Any]]:
    if type(first) is not type(second):
        yield f"{section}.type", first.type, second.type
        return
    for field in fields(first):
        value, other = (getattr(part, derived.get(field.name, field.name)) for part in (first, second))
        if field.name not in free and value != other:
            yield f"{section}.{field.name}", value, other


def describe_differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str | None:
    """Compare names and shapes.

    Args:
        wanted: shapes by name.
        found: shapes by name.

    Returns:
        One line that counts each kind and names the first few; None if both are the same.
    """
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": misshapen,
    }
    return "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names) or None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
