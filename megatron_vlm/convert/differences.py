"""How two models differ: in their settings, and in names and shapes of their tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlm.config import ModelConfig
from megatron_vlm.config.comparison import MayChange, compare_settings
from megatron_vlm.config.towers import innermost
from megatron_vlm.convert.family import find_tower_family

_SHOWN = 3
_TOWER = "model.vision"
_LAYERS = f"{_TOWER}.num_layers"


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
    free = {f"{_TOWER}.{name}" for name in find_tower_family(towers[1].type).FREE}
    found = [*compare_settings("model.language", first.language, second.language)]
    found = [difference for difference in found if difference.may_change is not MayChange.ALWAYS]
    found += [difference for difference in compare_settings(_TOWER, *towers) if difference.key not in free]
    if only_what_runs:
        ours, theirs = (getattr(tower, "num_layers_run", None) for tower in towers)
        found = [difference for difference in found if difference.key != _LAYERS]
        found += compare_settings(_LAYERS, ours, theirs)
    return [(difference.key, difference.first, difference.second) for difference in found]


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
