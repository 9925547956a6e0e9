"""Options of the command line: flags made from the fields of a dataclass, and the few that several verbs share."""

import argparse
import dataclasses
import math
import textwrap
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, TypeVar

from megatron_vlm.cli.values import local_path, location, location_text, new_folder, number, positive, whole_number
from megatron_vlm.config import UsageError
from megatron_vlm.config.options import Group, Option
from megatron_vlm.config.prepare import MAX_RECORD_BYTES
from megatron_vlm.platform.machine import count_cores

T = TypeVar("T")
_PATHS = {"location": location_text, "local": local_path, "new_folder": new_folder}
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20))


def add_command(
    subparsers: argparse._SubParsersAction, name: str, text: str, *examples: str, notes: str = ""
) -> argparse.ArgumentParser:
    """Add a verb, or an action of one.

    Args:
        subparsers: of the command line, or of the verb.
        name: the verb or action.
        text: what it does, in one line.
        examples: whole commands after the program's name, shown below the options.
        notes: more help, as it is; shown above the examples.
    """
    heading = "examples" if len(examples) > 1 else "example"
    lines = [*([notes.rstrip(), ""] if notes else []), f"{heading}:"]
    return subparsers.add_parser(
        name,
        help=text,
        description="\n".join(textwrap.wrap(text, 100)),
        epilog="\n".join([*lines, *(f"  megatron-vlm {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the file of a stage, and the settings that override it."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the stage")
    # A list by default: argparse calls an argument without a default required.
    text = "settings that override the file"
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=text)


def add_input(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --input, whose help is `text`."""
    parser.add_argument("--input", type=location, nargs="+", required=True, metavar="PATH", help=text)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers; the default counts only cores that SLURM lets this process use."""
    text = "processes (default: one per core)"
    parser.add_argument("--workers", type=positive, default=count_cores(), metavar="N", help=text)


def add_max_record_bytes(parser: argparse._ActionsContainer) -> None:
    """Add --max-record-bytes."""
    text = f"longest JSON record [bytes] (default: {_show(MAX_RECORD_BYTES)})"
    parser.add_argument("--max-record-bytes", type=positive, default=MAX_RECORD_BYTES, metavar="N", help=text)


class _Field(NamedTuple):
    """A field of a dataclass: an option, or a dataclass of options."""

    name: str
    type: Any
    """Without None: int of `int | None`."""
    default: Any
    """MISSING where the option is required."""
    marks: tuple[Any, ...]

    @property
    def option(self) -> Option | None:
        return next((mark for mark in self.marks if isinstance(mark, Option)), None)

    @property
    def group(self) -> Group | None:
        return next((mark for mark in self.marks if isinstance(mark, Group)), None)

    @property
    def flag(self) -> str:
        """The flag; --no-NAME where the default is yes."""
        given = self.option.flag if self.option else None
        return given or ("--no-" if self.default is True else "--") + self.name.replace("_", "-")

    @property
    def place(self) -> str:
        """Name among the parsed arguments."""
        return self.flag.removeprefix("--").replace("-", "_")


def add_options(
    parser: argparse.ArgumentParser,
    options: Any,
    without: Collection[str] = (),
    heading: argparse._ActionsContainer | None = None,
) -> None:
    """Add a flag for every field of a dataclass that is marked with `Option`, also of the dataclasses inside it.

    The parsed arguments have only what the user gave: defaults stay in the dataclass, where `read_options` takes them.

    Args:
        parser: of a command.
        options: the dataclass, or an instance whose values are the defaults.
        without: fields that get no flag.
        heading: where the flags stand in the help; None: at its beginning.

    Raises:
        TypeError: a field has a type that no flag can be made from.
    """
    for field in _fields(options):
        if field.name in without:
            continue
        if dataclasses.is_dataclass(field.default):
            group = field.group
            own = parser.add_argument_group(group.title) if group else heading
            add_options(parser, field.default, group.without if group else (), own)
        elif field.option is not None:
            _add_flag(heading or parser, field, field.option)


@typing.overload
def read_options(args: argparse.Namespace, options: type[T]) -> T: ...
@typing.overload
def read_options(args: argparse.Namespace, options: T) -> T: ...
def read_options(args: argparse.Namespace, options: Any) -> Any:
    """Return the dataclass with the values that the user gave.

    Args:
        args: parsed by a parser that `add_options` was called on with the same `options`.
        options: the dataclass, or an instance whose values are the defaults.

    Raises:
        UsageError: an option was given without another one that it needs, or the values contradict each other.
    """
    given = vars(args)
    values: dict[str, Any] = {}
    for field in _fields(options):
        if dataclasses.is_dataclass(field.default):
            values[field.name] = read_options(args, field.default)
        elif field.option is not None and field.place in given:
            if field.option.needs is not None:
                _check_needs(field.flag, field.option.needs, given)
            value = given[field.place]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    if isinstance(options, type):
        return options(**values)
    return dataclasses.replace(options, **values)


def _fields(options: Any) -> Iterator[_Field]:
    """Yield the fields of a dataclass, or of an instance with its values as defaults."""
    cls = options if isinstance(options, type) else type(options)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        marks = getattr(hint, "__metadata__", ())
        kind = hint.__origin__ if marks else hint
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(one for one in typing.get_args(kind) if one is not type(None))
        default = field.default if cls is options else getattr(options, field.name)
        yield _Field(field.name, kind, default, marks)


def _add_flag(parser: argparse._ActionsContainer, field: _Field, option: Option) -> None:
    settings: dict[str, Any] = {"help": _help(field, option), "default": argparse.SUPPRESS, "dest": field.place}
    if field.type is bool:
        parser.add_argument(field.flag, action="store_const", const=not field.default, **settings)
        return
    if field.default is dataclasses.MISSING:
        settings["required"] = True
    if typing.get_origin(field.type) is typing.Literal:
        settings["choices"] = typing.get_args(field.type)
    else:
        settings["type"], metavar = _reader(field, option)
        settings["metavar"] = option.metavar or metavar
    if typing.get_origin(field.type) is tuple:
        settings["nargs"] = "+"
    parser.add_argument(field.flag, **settings)


def _reader(field: _Field, option: Option) -> tuple[Any, str]:
    """Return the type for argparse and what stands for a value in the help."""
    if option.path is not None:
        return _PATHS[option.path], "PATH"
    if field.type is int and option.least is not None:
        return whole_number(int(option.least), None if option.most is None else int(option.most)), "N"
    if field.type is float:
        return number(
            -math.inf if option.least is None else option.least, math.inf if option.most is None else option.most
        ), "X"
    if field.type in (str, tuple[str, ...]):
        return str, "TEXT"
    raise TypeError(f"{field.name}: no flag can be made from {field.type}; an int needs its least value")


def _help(field: _Field, option: Option) -> str:
    default = option.default
    if default is None and field.default not in (None, dataclasses.MISSING) and field.type is not bool:
        default = _show(field.default)
    text = f"{option.help} (default: {default})" if default else option.help
    return text.replace("%", "%%")


def _show(value: Any) -> str:
    """Return a value as the help shows it, e.g. 4 GiB."""
    if isinstance(value, int):
        for unit, size in _UNITS:
            if value and value % size == 0:
                return f"{value // size} {unit}"
    return str(value)


def _check_needs(flag: str, needs: str, given: dict[str, Any]) -> None:
    name, _, value = needs.removeprefix("--").partition(" ")
    found = given.get(name.replace("-", "_"))
    if found is None or (value and found != value):
        raise UsageError(f"{flag} has no effect without {needs}", fix=f"add {needs}, or leave out {flag}")
