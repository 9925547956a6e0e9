"""Read settings from YAML files and dotted overrides into typed, frozen dataclasses."""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.config.presets import PRESET_KEY, read_preset
from megatron_vlm.config.yaml_text import MAX_CHARACTERS, read_yaml

T = TypeVar("T")
_BASE_KEY = "base"
_MAX_SHOWN = 100
_INT64 = 2**63


@dataclasses.dataclass(frozen=True, slots=True)
class TypeIn:
    """Marks a field, in `Annotated[...]`, whose section names a module in `type:`; `Config` of the module is loaded."""

    package: str
    """Full name of the package with the modules."""
    default: str | None = None
    """Type of a section without a `type:`; None if it is required."""
    presets: str | None = None
    """Full name of the package with the presets that a section may name; None for none."""


def load_config(cls: type[T], path: str | Path, overrides: typing.Sequence[str] = ()) -> T:
    """Load `cls` from a YAML file; later ones win: dataclass defaults, presets, `base` file, this file, overrides.

    Args:
        cls: a frozen dataclass whose fields may be dataclasses themselves. A section whose class has a `PRESETS`, the
            full name of a package, may name one of its presets by `preset:`.
        path: YAML file; its optional key `base` names the file that it extends, relative to itself.
        overrides: `section.key=value`, with the value in YAML; a list is replaced as a whole.

    Raises:
        ConfigError: missing file, invalid YAML, unknown key, wrong type or missing value; names file, line and key.
    """
    tree, lines = _read_tree(Path(path), seen=())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override {_shown(override)} is not section.key=value", fix="write it as optimizer.lr=1e-4"
            )
        try:
            value, _ = read_yaml(text)
        except yaml.YAMLError as error:
            what = f"override {_shown(override)} is not valid YAML: {_problem(error)}"
            raise ConfigError(what, fix="quote the value") from error
        _set_dotted(tree, key, value)
        for below in [name for name in lines if name.startswith((f"{key}.", f"{key}["))]:
            del lines[below]  # these values no longer come from the file
        lines[key] = f"override {override if len(override) <= _MAX_SHOWN else f'{key}=...'}"
    return _build(cls, tree, key="", lines=lines, source=str(path))


def load_section(cls: type[T], path: str | Path, key: str) -> T:
    """Load `cls` from one section of a YAML file, e.g. the model from the settings of a run.

    Raises:
        ConfigError: as for `load_config`, or the section is missing.
    """
    tree, lines = _read_tree(Path(path), seen=())
    if key not in tree:
        raise ConfigError(f"missing section {key}", where=str(path), fix=f"add a section {key}")
    return _build(cls, tree[key], key=key, lines=lines, source=str(path))


def load_preset(kind: Any, name: str) -> Any:
    """Return the settings of a preset.

    Args:
        kind: annotation of the section that may name it, e.g. `Tower`.
        name: of the preset.

    Raises:
        ConfigError: there is no such preset; lists the existing ones.
    """
    return _build(kind, {PRESET_KEY: name}, key="section", lines={}, source=f"preset {name}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested dicts with lists for tuples, ready for YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved config as YAML; `load_config` reads back an equal one."""
    Path(path).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def _read_tree(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the merged tree and the place where each dotted key was set."""
    if path.resolve() in seen:
        raise ConfigError(
            "config files extend each other in a circle", where=str(path), fix="remove one of the `base` keys"
        )
    try:
        with path.open() as file:
            text = file.read(MAX_CHARACTERS + 1)  # a device has no end
    except FileNotFoundError as error:
        raise ConfigError("config file does not exist", where=str(path), fix="check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file cannot be read: {error}", where=str(path), fix="check the file") from error
    try:
        tree, node = read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = f"config file is not valid YAML: {_problem(error)}"
        raise ConfigError(what, where=where, fix="check indentation, quotes and values") from error
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError("config file is not a mapping", where=str(path), fix="write sections with key: value")
    lines: dict[str, str] = {}
    _collect_lines(node, "", path, lines)
    base = tree.pop(_BASE_KEY, None)
    if base is None:
        return tree, lines
    if not isinstance(base, str) or "\0" in base:
        raise _wrong(_BASE_KEY, base, "the path of a file", lines[_BASE_KEY])
    base_tree, base_lines = _read_tree(path.parent / base, (*seen, path.resolve()))
    _overlay(base_tree, tree)
    return base_tree, {**base_lines, **lines}


def _collect_lines(node: yaml.Node | None, prefix: str, path: Path, lines: dict[str, str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _collect_lines(item, f"{prefix}[{position}]", path, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        where = f"{path}:{key_node.start_mark.line + 1}"
        if key in lines:  # YAML silently keeps the last one
            raise ConfigError(f"key {key} is set twice", where=where, fix=f"keep one; the other is at {lines[key]}")
        lines[key] = where
        _collect_lines(value_node, key, path, lines)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> None:
    """Write the values of `top` into `base`; a section of another type replaces the one below it as a whole."""
    for key, value in top.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _replaces(value, below):
            _overlay(below, value)
        else:
            base[key] = value


def _replaces(section: dict[str, Any], below: dict[str, Any]) -> bool:
    """Tell whether a section has, or may get from its preset, another type than the one below it."""
    if "type" not in below:
        return False
    return section["type"] != below["type"] if "type" in section else section.get(PRESET_KEY) is not None


def _with_preset(
    package: str | None, section: dict[str, Any], *, key: str, lines: dict[str, str], source: str
) -> dict[str, Any]:
    """Return a section with the settings of the preset that it names, if any, under its own.

    Settings of a preset have no line: errors about them name that of the section.

    Raises:
        ConfigError: there is no such preset, or a file or an override names it beside another type.
    """
    seen: list[object] = []
    while package is not None and PRESET_KEY in section:
        name, what = section[PRESET_KEY], f"{key}.{PRESET_KEY}"
        section = {field: value for field, value in section.items() if field != PRESET_KEY}
        if name is None:
            break
        where = _place_of(what, lines, source)
        if name in seen:
            what = f"the presets {', '.join(map(str, seen))} build on each other"
            raise ConfigError(what, where=where, fix="take the preset out of one of them")
        seen.append(name)
        below = read_preset(package, name, what, where=where)
        if "type" not in section or section["type"] == below.get("type"):
            _overlay(below, section)
            section = below
        elif what in lines and f"{key}.type" in lines:
            raise ConfigError(
                f"{what} {name} is of type {below['type']}, the section of type {section['type']}",
                where=where,
                fix=f"remove one of them, or set {what}: null",
            )
    return section


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {parent} is not a section", fix="name the whole path of a single value")
        tree = child
    tree[last] = value


def _build(kind: Any, value: Any, *, key: str, lines: dict[str, str], source: str) -> Any:
    """Convert a YAML value to `kind`; errors name the key."""
    where = _place_of(key, lines, source)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        type_in = next((mark for mark in kind.__metadata__ if isinstance(mark, TypeIn)), None)
        if type_in is None:
            return _build(arguments[0], value, key=key, lines=lines, source=source)
        return _build_typed(type_in, value, key=key, lines=lines, source=source)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kind = _fitting(value, [argument for argument in arguments if argument is not type(None)])
        return _build(kind, value, key=key, lines=lines, source=source)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key=key, lines=lines, source=source)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise _wrong(key, value, f"one of {', '.join(map(str, arguments))}", where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(key, value, "a list", where)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise _wrong(key, value, f"a list of {len(kinds)}", where)
        return tuple(
            _build(item_kind, item, key=f"{key}[{position}]", lines=lines, source=source)
            for position, (item_kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(key, value, "a mapping", where)
        return {
            str(name): _build(arguments[1], item, key=f"{key}.{name}", lines=lines, source=source)
            for name, item in value.items()
        }
    return _build_scalar(kind, value, key=key, where=where)


def _fitting(value: Any, kinds: list[Any]) -> Any:
    """Return the only kind, or of several the one for lists if the value is a list, and the first other one if not."""
    is_list = isinstance(value, (list, tuple))
    return next((kind for kind in kinds if (typing.get_origin(kind) is tuple) == is_list), kinds[0])


def _build_typed(type_in: TypeIn, value: Any, *, key: str, lines: dict[str, str], source: str) -> Any:
    section = {} if value is None else value
    if not isinstance(section, dict):
        raise _wrong(key, section, "a section", _place_of(key, lines, source))
    section = _with_preset(type_in.presets, section, key=key, lines=lines, source=source)
    name, type_key = section.get("type", type_in.default), f"{key}.type"
    where = _place_of(type_key, lines, source)
    if name is None:
        fix = f"set it to one of: {', '.join(module_names(type_in.package)) or 'none in this version'}"
        raise ConfigError(f"missing value {type_key}", where=where, fix=fix)
    cls = find_module(type_in.package, str(name), type_key, where=where).Config
    return _build_dataclass(cls, section, key=key, lines=lines, source=source, type_name=str(name))


def _build_scalar(kind: type, value: Any, *, key: str, where: str) -> Any:
    if kind is float:
        return _build_float(value, key=key, where=where)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is not bool and isinstance(value, bool):
        raise _wrong(key, value, kind.__name__, where)
    if not isinstance(value, kind):
        raise _wrong(key, value, kind.__name__, where)
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise _wrong(key, value, "an integer of at most 64 bits", where)
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise _wrong(key, value, "text without NUL and surrogates", where)
    return value


def _build_float(value: Any, *, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _wrong(key, value, "a number", where)
    try:
        number = float(value)  # YAML 1.1 reads 1e-5, the usual spelling, as text
    except (ValueError, OverflowError):
        raise _wrong(key, value, "a number", where) from None
    if not math.isfinite(number):
        raise _wrong(key, value, "a finite number", where)
    return number


def _place_of(key: str, lines: dict[str, str], source: str) -> str:
    """Return where a key was set: its line or override, else that of the section or list around it, else the file."""
    while key not in lines and (borders := [i for i, sign in enumerate(key) if sign in ".["]):
        key = key[: borders[-1]]
    return lines.get(key, source)


def _build_dataclass(
    cls: Any, value: Any, *, key: str, lines: dict[str, str], source: str, type_name: str | None = None
) -> Any:
    where = _place_of(key, lines, source)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise _wrong(key, value, "a section", where)
    value = _with_preset(getattr(cls, "PRESETS", None), value, key=key, lines=lines, source=source)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    of_type = f" for type {type_name}" if type_name else ""
    for name in value:
        if name in fields:
            continue
        dotted = f"{key}.{name}" if key else str(name)
        guess = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
        fix = f"did you mean {key + '.' if key else ''}{guess[0]}" if guess else f"keys here: {', '.join(fields)}"
        raise ConfigError(f"unknown key {dotted}{of_type}", where=_place_of(dotted, lines, source), fix=fix)
    built = {}
    for name, field in fields.items():
        dotted = f"{key}.{name}" if key else name
        if name in value:
            built[name] = _build(hints[name], value[name], key=dotted, lines=lines, source=source)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing value {dotted}{of_type}", where=where, fix=f"set {dotted}")
    try:
        return cls(**built)
    except ConfigError as error:
        if error.where is None:
            raise ConfigError(error.what, where=where, fix=error.fix) from None
        raise


def _wrong(key: str, value: Any, expected: str, where: str) -> ConfigError:
    return ConfigError(f"{key}={_shown(value)} is not {expected}", where=where, fix=f"give {key} as {expected}")


def _shown(value: Any) -> str:
    """Return a value as Python writes it, shortened for one line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return "a huge number"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _problem(error: yaml.YAMLError) -> str:
    """Return what is wrong, without the place and the copy of the text that yaml adds."""
    return str(getattr(error, "problem", None) or str(error).splitlines()[0])
