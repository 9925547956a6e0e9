"""Where an export may be written."""

from pathlib import Path

from megatron_vlm.checkpoint.base import with_bases
from megatron_vlm.config import UsageError

_MARKS = ("config.json", "adapter_config.json", "model.gguf")
"""Every folder of a format has one of these files."""


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds a model of another program, such as an export."""
    return any((folder / name).is_file() for name in _MARKS)


def check_output(output: Path, checkpoint: Path, *, overwrite: bool) -> None:
    """Check that an export may be written to a folder, before anything is computed.

    Args:
        output: the folder.
        checkpoint: what is exported.
        overwrite: whether the user allows to replace the folder.

    Raises:
        UsageError: it exists and must not be replaced, or holds more than an earlier export.
    """
    if not output.exists():
        return
    if not overwrite:
        raise UsageError(f"folder {output} exists", fix="name another one, or add --overwrite")
    place = output.resolve()
    if any(source.resolve().is_relative_to(place) for source in with_bases(checkpoint)):
        reason = "holds the checkpoint itself"
    elif Path.cwd().is_relative_to(place):
        reason = "holds the working directory"
    elif output.is_dir() and (is_model_folder(output) or not any(output.iterdir())):
        return
    else:
        reason = "is no export"
    raise UsageError(f"{output} {reason}, so that --overwrite does not replace it", fix="name another folder")
