"""Modules found by name: each file in a folder is one choice, so a new file adds a choice."""

import importlib
import pkgutil
from types import ModuleType

from megatron_vlm.config.errors import ConfigError


def module_names(package: str) -> tuple[str, ...]:
    """Return the names of the modules directly inside a package, sorted, without importing them.

    Args:
        package: full name of a package, e.g. "megatron_vlm.evaluation.tasks".
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


def find_module(package: str, name: str, what: str, *, where: str | None = None) -> ModuleType:
    """Import the module `name` of a package.

    Args:
        package: full name of the package.
        name: the choice that a user made.
        what: what the modules of this package are, for the error, e.g. "task".
        where: file and line of the choice, if known.

    Raises:
        ConfigError: there is no such module; lists the existing ones.
    """
    names = module_names(package)
    if name not in names:
        fix = f"choose one of {', '.join(names)}" if names else "remove it: this version has none"
        raise ConfigError(f"unknown {what} {name!r}", where=where, fix=fix)
    return importlib.import_module(f"{package}.{name}")
