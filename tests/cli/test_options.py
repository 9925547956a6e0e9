import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from megatron_vlm.cli import options as module
from megatron_vlm.cli.options import add_options, read_options
from megatron_vlm.config import UsageError
from megatron_vlm.config.modules import find_module, module_names
from megatron_vlm.config.options import Group, Option
from megatron_vlm.config.prepare import PrepareOptions

GOLDEN = Path(__file__).parents[1] / "golden" / "prepare_flags.json"
KINDS = "megatron_vlm.config.sources"


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """Options inside of another dataclass."""

    grade: Annotated[Literal["whole", "broken"], Option("what is left of a leaf")] = "whole"
    weight: Annotated[int, Option("size of a chest [bytes]", least=1)] = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Tea:
    """One of everything."""

    pots: Annotated[tuple[str, ...], Option("pots to fill")]
    strength: Annotated[float, Option("share of 100 %", least=0, most=1)] = 0.5
    milk: Annotated[bool, Option("add milk")] = False
    stir: Annotated[bool, Option("do not stir")] = True
    sugar: Annotated[int | None, Option("lumps", least=0, most=9, flag="--lumps-of-sugar")] = None
    spoon: Annotated[str, Option("what stirs", needs="--lumps-of-sugar")] = "silver"
    saucer: Annotated[str, Option("what is below", needs="--grade broken", default="a plain one")] = "-"
    leaves: Annotated[Leaves, Group("leaves")] = Leaves()
    note: str = "is no option"

    def __post_init__(self) -> None:
        if self.milk and self.strength < 0.1:
            raise UsageError("--milk hides a --strength this low")


def parse(*arguments: str, options: Any = Tea) -> Any:
    parser = argparse.ArgumentParser()
    add_options(parser, options)
    return read_options(parser.parse_args(arguments), options)


def test_defaults_are_those_of_the_dataclass():
    assert parse("--pots", "a", "b") == Tea(pots=("a", "b"))


def test_every_type_of_field_has_its_flag():
    given = "--pots a --strength 0.25 --milk --no-stir --lumps-of-sugar 3 --spoon tin --grade broken --weight 7"
    assert parse(*given.split()) == Tea(
        pots=("a",), strength=0.25, milk=True, stir=False, sugar=3, spoon="tin", leaves=Leaves(grade="broken", weight=7)
    )


def test_an_instance_gives_the_defaults():
    defaults = Tea(pots=("p",), strength=0.75, leaves=Leaves(weight=5))
    assert parse("--grade", "broken", options=defaults) == dataclasses.replace(
        defaults, leaves=Leaves(grade="broken", weight=5)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--pots a --spoon tin",
            "--spoon has no effect without --lumps-of-sugar; fix: add --lumps-of-sugar, or leave out --spoon",
        ),
        ("--pots a --saucer x", "--saucer has no effect without --grade broken"),
        ("--pots a --saucer x --grade whole", "--saucer has no effect without --grade broken"),
        ("--pots a --milk --strength 0", "--milk hides a --strength this low"),
    ],
)
def test_options_that_do_not_fit_together_are_a_wrong_command_line(given, message):
    with pytest.raises(UsageError, match=message):
        parse(*given.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "required: --pots"),
        ("--pots a --strength 2", "2 is above 1"),
        ("--pots a --lumps-of-sugar 10", "10 is not from 0 to 9"),
        ("--pots a --weight 0", "0 is below 1"),
        ("--pots a --grade dust", "invalid choice"),
        ("--pots a --note x", "unrecognized arguments"),
    ],
)
def test_values_are_checked_as_they_are_parsed(given, message, capsys):
    with pytest.raises(SystemExit):
        parse(*given.split())
    assert message in capsys.readouterr().err


def test_help_has_the_texts_and_defaults_of_the_fields():
    parser = argparse.ArgumentParser()
    add_options(parser, Tea, without=("milk",))
    text = parser.format_help()
    for expected in (
        "100 % (default: 0.5)",
        "(default: 4 GiB)",
        "(default: a plain one)",
        "leaves:",
        "--no-stir",
    ):
        assert expected in text
    assert "--milk" not in text
    assert "None" not in text


def test_a_field_that_no_flag_can_be_made_from_is_a_bug():
    @dataclass
    class Wrong:
        table: Annotated[dict, Option("?")]

    with pytest.raises(TypeError, match="table: no flag can be made from"):
        add_options(argparse.ArgumentParser(), Wrong)


def flags_of(options: Any, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Return what the flags of a dataclass are, in the form of the golden file."""
    found: dict[str, dict[str, Any]] = {}
    for field in module._fields(options):
        if field.name in without:
            continue
        if dataclasses.is_dataclass(field.default):
            found |= flags_of(field.default, field.group.without if field.group else ())
        elif field.option is not None:
            parser = argparse.ArgumentParser()
            module._add_flag(parser, field, field.option)
            action = parser._actions[-1]
            row: dict[str, Any] = {"choices": list(action.choices)} if action.choices else {}
            if action.nargs == "+":
                row["nargs"] = "+"
            if action.required:
                row["required"] = True
            elif field.type is bool:
                row["switch"] = True
            else:
                row["default"] = field.default
            assert field.flag not in found
            found[field.flag] = row
    return found


@pytest.mark.parametrize("kind", ["conversations", "interleaved", "pairs", "text"])
def test_flags_of_prepare_and_their_defaults_stay(kind):
    """The golden file lists the flags from before they were made from fields, less those cut since."""
    golden = json.loads(GOLDEN.read_text())[kind]
    assert flags_of(PrepareOptions) | flags_of(find_module(KINDS, kind, "kind").Options()) == golden


def test_the_golden_file_has_every_kind():
    assert sorted(json.loads(GOLDEN.read_text())) == list(module_names(KINDS))
