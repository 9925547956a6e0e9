"""Export a checkpoint in a format that is found by its name: a family of whole models, or a module of `formats/`."""

from pathlib import Path
from typing import Protocol, cast

from megatron_vlm.checkpoint.run_settings import RunSettings
from megatron_vlm.config import UsageError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.convert.family import format_names
from megatron_vlm.convert.to_hf import ExportOptions, export_model

FORMATS = "megatron_vlm.convert.formats"


class Format(Protocol):
    """A format with a layout of its own; its module has the same name."""

    def export(self, settings: RunSettings, output: Path, options: ExportOptions) -> str:
        """Write a folder; it appears under its name once it is complete and read back.

        Args:
            settings: the checkpoint.
            output: the folder; must not exist unless `options.overwrite`.
            options: what does not concern the format is ignored.

        Returns:
            What loads the folder, for people.

        Raises:
            UsageError: the folder exists, or a package is missing.
            CheckpointError: the checkpoint is damaged, or the format cannot hold the model.
            StorageError: the disk is full or read-only.
        """


def export(settings: RunSettings, output: Path, options: ExportOptions | None = None) -> str:
    """Write a checkpoint in the format `options.format`.

    Args:
        settings: the checkpoint.
        output: the folder; must not exist unless `options.overwrite`.
        options: None: the defaults.

    Returns:
        What loads the folder, for people.

    Raises:
        UsageError: the format is unknown; lists those that exist. Otherwise as the format's own function.
    """
    options = options or ExportOptions()
    if options.format in module_names(FORMATS):
        return cast(Format, find_module(FORMATS, options.format, "export format")).export(settings, output, options)
    if options.format not in format_names():
        names = sorted([*format_names(), *module_names(FORMATS)])
        raise UsageError(f"unknown export format {options.format!r}", fix=f"choose one of {', '.join(names)}")
    return f"{export_model(settings, output, options)}.from_pretrained"


def is_whole_model(name: str) -> bool:
    """Return whether the format holds a whole model that `convert verify` reads."""
    return name in format_names()
