"""Find the line of a program that an operation on the fake device comes from."""

import sys
from pathlib import Path

import megatron_vlm

_HOME = Path(megatron_vlm.__file__).parent
_WATCHERS = (_HOME / "platform", _HOME / "training" / "rehearsal")
_OTHERS = ("megatron/core", "transformer_engine")
_names: dict[str, tuple[str, bool] | None] = {}
"""By file name of a code object: its name in reports, and whether it is of this package; None where it is neither."""


def caller() -> str:
    """Return `file:line` of the innermost frame of the program; of another package, also who in this package called it.

    "?" if no frame is of this package or megatron-core.
    """
    inner, frame = "", sys._getframe(1)
    while frame is not None:
        code = frame.f_code.co_filename
        if code not in _names:
            _names[code] = _short_name(Path(code))
        found = _names[code]
        if found is not None:
            name, is_ours = found
            place = f"{name}:{frame.f_lineno}"
            if is_ours:
                return f"{inner} from {place}" if inner else place
            inner = inner or place
        frame = frame.f_back  # type: ignore[assignment]
    return inner or "?"


def _short_name(path: Path) -> tuple[str, bool] | None:
    if path.is_relative_to(_HOME):
        watches = any(path.is_relative_to(watcher) for watcher in _WATCHERS)
        return None if watches else (path.relative_to(_HOME.parent).as_posix(), True)
    for package in _OTHERS:
        _, found, rest = path.as_posix().rpartition(f"/{package}/")
        if found:
            return f"{package}/{rest}", False
    return None
