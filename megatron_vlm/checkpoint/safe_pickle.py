"""Inspect what a torch_dist checkpoint has pickled, before torch unpickles it without restrictions.

torch does so with the index, `.metadata`, and with objects that are no tensors; transformer-engine with the extra
state of the FP8 recipe "delayed". A hostile file could run code. Here, the same opcodes run, but every name stands for
a harmless substitute that takes what the real one is saved with and nothing else, so the inspection itself calls
nothing that the file chooses.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What unpickling raises, by Python's or torch's unpickler, when bytes are damaged or name what they may not."""


class _Sealed(type):
    """Type of the records: an instance comes from the opcode NEWOBJ, and BUILD fills it; the class stays as it is."""

    def __call__(cls, *arguments: Any) -> Any:
        raise pickle.UnpicklingError(f"it calls {cls.__name__}")

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it changes {cls.__name__}")


class Record(metaclass=_Sealed):
    """Substitute of a dataclass: holds the values of its fields as attributes."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise pickle.UnpicklingError(f"it fills {type(self).__name__} with {type(state).__name__}")
        # APPEND calls an attribute `append` of any object, for example.
        if any(name.startswith("__") or callable(value) for name, value in state.items()):
            raise pickle.UnpicklingError(f"it changes the methods of {type(self).__name__}")
        self.__dict__.update(state)


class _Properties(Record):
    """Substitute of TensorProperties, which is saved as a tuple."""

    def __setstate__(self, state: Any) -> None:
        dtype, layout, requires_grad, memory_format, pin_memory = state
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it has {type(dtype).__name__} for a dtype")
        super().__setstate__({"dtype": dtype, "layout": layout, "requires_grad": requires_grad})


class _Pair(Record):
    """Substitute of a named tuple of numbers, which is saved as arguments of NEWOBJ."""

    def __new__(cls, *values: float) -> "_Pair":
        _require(values, int, float)
        return object.__new__(cls)


class _Constructor:
    """Substitute of a callable; the opcode REDUCE may call it with arguments of its own kind."""

    __slots__ = ("_build", "_types")

    def __init__(self, build: Callable[..., Any], *types: type) -> None:
        self._build, self._types = build, types

    def __call__(self, *arguments: Any) -> Any:
        _require(arguments, *self._types)
        return self._build(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a constructor")


class _Member:
    """Substitute of an enum's member."""

    __slots__ = ()


def _require(values: tuple, *types: type) -> None:
    for value in values:
        if not isinstance(value, types):
            raise pickle.UnpicklingError(f"it calls a constructor with {type(value).__name__}")


def _size(values: tuple) -> tuple:
    _require(values, int)
    return values


def _member(*value: Any) -> _Member:
    return _Member()


def _path(*parts: str) -> str:
    return "/".join(parts)


def _attribute(owner: _Constructor, name: str) -> _Member:
    """Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(class, name)."""
    if owner not in _ENUMS or not name.isupper():
        raise pickle.UnpicklingError(f"it reads an attribute {name}")
    return _Member()


def _storage(content: bytes) -> Record:
    """Substitute of torch.storage._load_from_bytes, which loads a torch file within the pickle without restrictions."""
    torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return object.__new__(Record)


def _records(*names: str, kind: type[Record] = Record) -> dict[str, Any]:
    return {name: _Sealed(name, (kind,), {}) for name in names}


_ENUMS = (_Constructor(_member, int), _Constructor(_member, int))
_PATHS = dict.fromkeys(("Path", "PosixPath"), _Constructor(_path, str))
_INDEX_NAMES: dict[str, dict[str, Any]] = {
    "torch.distributed.checkpoint.metadata": {
        **_records("Metadata", "TensorStorageMetadata", "BytesStorageMetadata"),
        **_records("ChunkStorageMetadata", "MetadataIndex", "StorageMeta"),
        **_records("TensorProperties", kind=_Properties),
        "_MEM_FORMAT_ENCODING": _ENUMS[0],
    },
    "torch.distributed.checkpoint.filesystem": _records("_StorageInfo"),
    "torch.distributed.checkpoint.planner": {
        **_records("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"),
        "WriteItemType": _ENUMS[1],
    },
    "megatron.core.dist_checkpointing.strategies.torch": _records("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "builtins": {"getattr": _Constructor(_attribute, _Constructor, str)},
    "torch": {"Size": _Constructor(_size, tuple)},
    "torch.serialization": {"_get_layout": _Constructor(str, str)},
}
_RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "QParams", "MMParams")
_FP8_NAMES: dict[str, dict[str, Any]] = {
    "transformer_engine.common.recipe": {
        **_records(*_RECIPES),
        **_records("_FormatHelper", kind=_Pair),
        "Format": _Constructor(_member, _Pair),
    },
    "torch._utils": {"_rebuild_tensor_v2": _Constructor(_member, Record, int, tuple, bool, dict)},
    "torch.storage": {"_load_from_bytes": _Constructor(_storage, bytes)},
    "collections": {"OrderedDict": _Constructor(dict)},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of one table alone; persistent ids are refused by the base class."""

    def __init__(self, stream: BinaryIO, names: dict[str, dict[str, Any]]) -> None:
        super().__init__(stream)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        try:
            return self._names[module][name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def unpickle_index(stream: BinaryIO) -> Record:
    """Return the index of a checkpoint as records whose attributes are the fields of torch's dataclasses.

    Raises:
        UNREADABLE: it is damaged, or names, calls or changes what an index does not.
    """
    index = _Unpickler(stream, _INDEX_NAMES).load()
    if type(index).__name__ != "Metadata":
        raise pickle.UnpicklingError(f"it is a {type(index).__name__}")
    return index


def check_object(content: bytes) -> None:
    """Inspect an object of a checkpoint that is no tensor: extra states of modules of transformer-engine.

    megatron-core stores a list with one state.

    Raises:
        UNREADABLE: it is damaged, or holds anything but tensors, plain values and an FP8 recipe.
    """
    found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    for state in found if isinstance(found, list) else [found]:
        _check_extra_state(state)


def _check_extra_state(state: Any) -> None:
    if isinstance(state, io.BytesIO):  # of transformer-engine before 1.14
        torch.load(state, map_location="cpu", weights_only=True)
    elif not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8:
        raise pickle.UnpicklingError(f"extra state is a {type(state).__name__}")
    elif state.numel():
        _Unpickler(io.BytesIO(state.numpy().tobytes()), _FP8_NAMES).load()
