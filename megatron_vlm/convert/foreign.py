"""Say what a folder is that cannot be imported, and what to do about it."""

import re
from collections.abc import Collection
from pathlib import Path

from megatron_vlm.config import CheckpointError

_SOURCE = "use the folder of the model that it was made from"
_KINDS = (
    ("adapter_config.json", "a LoRA of PEFT", "name it with --peft, and the run that it adapts with --base"),
    ("*.gguf", "a model of llama.cpp", _SOURCE),
    ("*awq*.pt", "a model that is quantised for TinyChat", _SOURCE),
    ("consolidated.*", "a model in the layout of its makers", "use the same model in Hugging Face's layout"),
    ("*.onnx", "a model in ONNX", _SOURCE),
)
"""Files that show it, what the folder is, and what to do."""
_OURS = (
    ("checkpoints/iter_*", "a run of this program", "train from it with checkpoint.load_weights"),
    ("common.pt", "a checkpoint of this program", "train from it with checkpoint.load_weights"),
)
"""The same for folders of this program, which other commands read."""
_QUANTISED = re.compile(r".*\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|SCB|absmax|quant_map)")
"""Names of tensors of AWQ, GPTQ, compressed-tensors, bitsandbytes and FP8."""


def explain(path: Path, *, ours: bool = True) -> CheckpointError | None:
    """Return what a path is if it is known to be something that cannot be imported; None if it is not.

    Args:
        path: the folder that was named.
        ours: whether runs and checkpoints of this program count as such.
    """
    if path.is_file():
        return CheckpointError("path is a file", where=str(path), fix=f"name its folder, {path.parent}")
    for pattern, what, fix in (*_KINDS, *(_OURS if ours else ())):
        if found := next(iter(sorted(path.glob(pattern))), None):
            name = found.relative_to(path)
            return CheckpointError(f"the folder holds {what} ({name})", where=str(path), fix=fix)
    return None


def check_plain(names: Collection[str], where: Path) -> None:
    """Check that the weights are not quantised, whatever config.json says.

    Args:
        names: of tensors that a plain model does not have.
        where: their folder, for the message.

    Raises:
        CheckpointError: they are.
    """
    if found := next(filter(_QUANTISED.fullmatch, sorted(names)), None):
        raise CheckpointError(f"the weights are quantised (tensor {found})", where=str(where), fix=_SOURCE)
