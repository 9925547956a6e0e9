"""Inspect the pickled index of a torch_dist checkpoint before torch loads it.

`torch.distributed.checkpoint` unpickles `.metadata` without restrictions, so a hostile file could run code.
"""

import pickle
from pathlib import Path
from typing import Any

from megatron_vlm.config import CheckpointError

METADATA_NAME = ".metadata"
_ALLOWED_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_ALLOWED_NAMES = {
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("builtins", "tuple"),
    ("builtins", "slice"),
    ("builtins", "getattr"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("io", "BytesIO"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.serialization", "_get_layout"),
}
_ALLOWED_TORCH_KINDS = ("dtype", "layout", "memory_format")


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _safe_getattr
        allowed = (module, name) in _ALLOWED_NAMES or module.startswith(_ALLOWED_MODULES)
        if module == "torch" and not allowed:
            allowed = type(super().find_class(module, name)).__name__ in _ALLOWED_TORCH_KINDS
        if not allowed or "." in name:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _safe_getattr(owner: Any, name: str) -> Any:
    """Stand in for getattr: enum members in torch's metadata are pickled as getattr(class, name)."""
    if not isinstance(owner, type) or name.startswith("_"):
        raise pickle.UnpicklingError(f"it reads {name} of {owner!r}")
    return getattr(owner, name)


def check_metadata(checkpoint: Path) -> None:
    """Reject a checkpoint whose index could run code.

    Raises:
        CheckpointError: the index is missing, damaged, or names anything other than checkpoint records.
    """
    path = checkpoint / METADATA_NAME
    try:
        with path.open("rb") as stream:
            _RestrictedUnpickler(stream).load()
    except FileNotFoundError:
        raise CheckpointError(
            "checkpoint has no tensor index", where=str(path), fix="use a complete checkpoint"
        ) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"tensor index is damaged or hostile: {error}", where=str(path), fix="use a checkpoint that you trust"
        ) from None
