"""Names and sizes of the parameters of building blocks that several parts are made of."""

from collections.abc import Mapping


def prefixed(prefix: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return sizes whose names start with `prefix` and a dot."""
    return {f"{prefix}.{name}": size for name, size in sizes.items()}


def linear_sizes(inputs: int, outputs: int, *, bias: bool = True) -> dict[str, int]:
    """Return the sizes of a linear layer."""
    return {"weight": inputs * outputs, **({"bias": outputs} if bias else {})}


def norm_sizes(width: int, *, bias: bool = True) -> dict[str, int]:
    """Return the sizes of a LayerNorm, or without a bias those of an RMSNorm."""
    return {"weight": width, **({"bias": width} if bias else {})}
