import ast
import pickle
from pathlib import Path

import pytest

import megatron_vlm
from megatron_vlm.config import (
    CheckpointError,
    ConfigError,
    DataError,
    ExitCode,
    NumericError,
    StorageError,
    UsageError,
    UserError,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UsageError, 64),
        (DataError, 65),
        (CheckpointError, 65),
        (NumericError, 70),
        (StorageError, 74),
        (ConfigError, 78),
    ],
)
def test_kind_of_error_has_its_exit_code(kind, code):
    assert kind("x").exit_code == code


def test_line_names_what_where_and_fix():
    assert str(UserError("3 of 4 files", where="00000.bin", fix="copy it again")) == (
        "3 of 4 files (00000.bin); fix: copy it again"
    )


def test_parts_that_are_missing_leave_no_trace():
    assert str(UserError("3 of 4 files")) == "3 of 4 files"


def test_line_is_one_line_whatever_it_was_made_of():
    assert "\n" not in str(UserError("first\n  second", where="a\nb", fix="do\tthat"))


def test_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(DataError("what", where="where", fix="fix")))
    assert (type(error), error.what, error.where, error.fix) == (DataError, "what", "where", "fix")


def test_every_error_says_what_to_do():
    kinds = {kind.__name__ for kind in (UserError, *UserError.__subclasses__())}
    calls = [
        (path, call)
        for path in Path(megatron_vlm.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds
    ]
    without = [f"{path}:{call.lineno}" for path, call in calls if "fix" not in {word.arg for word in call.keywords}]
    assert len(calls) > 300
    assert not without


def test_exit_codes_differ():
    assert len({int(code) for code in ExitCode}) == len(ExitCode.__members__)
