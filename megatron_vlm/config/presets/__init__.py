"""Settings of published models, one YAML file each, which a section names by `preset:` and changes by its other keys.

A folder beside this file belongs to one section: `models` to `model`, `language` to `model.language` and `vision` to
`model.vision`. A preset may itself build on another one of its folder, or name presets of its parts.
"""

import importlib
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.config.errors import ConfigError

PRESET_KEY = "preset"


def preset_names(package: str) -> tuple[str, ...]:
    """Return the names of the presets in a package, sorted.

    Args:
        package: full name, e.g. "megatron_vlm.config.presets.language".
    """
    return tuple(sorted(_files(package)))


def read_preset(package: str, name: object, what: str, *, where: str | None = None) -> dict[str, Any]:
    """Return the settings of a preset as its file has them.

    Args:
        package: full name of the package with the files.
        name: the choice that a user made.
        what: the key of the choice, for the error, e.g. "model.preset".
        where: file and line of the choice, if known.

    Raises:
        ConfigError: there is no such preset; lists the existing ones.
    """
    files = _files(package)
    if str(name) not in files:
        raise ConfigError(f"unknown {what} {name!r}", where=where, fix=f"choose one of {', '.join(sorted(files))}")
    settings: dict[str, Any] = yaml.safe_load(files[str(name)].read_text())
    return settings


def _files(package: str) -> dict[str, Path]:
    folders = importlib.import_module(package).__path__
    return {path.name.removesuffix(".yaml"): path for folder in folders for path in Path(folder).glob("*.yaml")}
