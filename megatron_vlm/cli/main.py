"""The command `megatron-vlm`: finds the verb, runs it, and turns errors into one line and an exit code.

A verb is a module of this folder with `add_parser(subparsers)`, which sets `run(args) -> int` as a default and imports
what is heavy only inside `run`. A new file is a new verb.
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import megatron_vlm
from megatron_vlm.config import ExitCode, UsageError
from megatron_vlm.config.modules import module_names
from megatron_vlm.platform.launch.exit_status import describe_error, error_line, say
from megatron_vlm.platform.launch.launch import STOP_SIGNALS

_PACKAGE = "megatron_vlm.cli"
_PROGRAM = "megatron-vlm"
_EPILOG = """\
example:
  megatron-vlm train examples/vila_7b/pretrain.yaml training.micro_batch_size=2 --nproc-per-node 8

exit codes: 0 done, 1 crash or dead rank, 64 wrong command line, 65 bad data or checkpoint, 70 loss not finite, 71 hang,
74 disk, 75 stopped cleanly (run the same command again), 78 wrong setting or file, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the exit code for a wrong command line."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse, but first look for unknown options: argparse would report a mistyped one as a missing one."""
        for argument in args or ():
            if argument == "--" or (self._subparsers is not None and not argument.startswith("-")):
                break  # the rest are values, or belong to a verb of its own
            self._check_option(argument.partition("=")[0])
        return super().parse_known_args(args, namespace)

    def _check_option(self, name: str) -> None:
        options = [option for option in self._option_string_actions if option.startswith("--")]
        if not name.startswith("--") or any(option.startswith(name) for option in options):
            return
        guess = difflib.get_close_matches(name, options, n=1)
        if guess:
            raise UsageError(f"unknown option {name}", fix=f"did you mean {guess[0]}?")
        if self._subparsers is not None:
            raise UsageError(f"option {name} stands too early", fix=f"put it after the {self._first_word()}")
        raise UsageError(f"unknown option {name}", fix=f"see {self.prog} --help")

    def _first_word(self) -> str:
        """Return what comes first on this command line, e.g. ACTION."""
        return next(str(action.metavar) for action in self._actions if isinstance(action, argparse._SubParsersAction))

    def error(self, message: str) -> NoReturn:
        """Raise the error that argparse would print."""
        raise UsageError(message, fix=f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: arguments after the program's name; None: the arguments of this process.

    Raises:
        Exception: an unforeseen error, which Python reports with a traceback and exit code 1.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            args = _parse(arguments)
            return args.run(args)
        finally:
            if argv is None:
                _ignore_stop_signals()
            sys.stdout.flush()
    except BrokenPipeError:  # `megatron-vlm data stats D | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        status = describe_error(error)
        if status.exit_code == ExitCode.CRASH:
            raise
        say(error_line(status.message) + "\n")
        return status.exit_code


def _ignore_stop_signals() -> None:
    """Let no signal from now on replace the exit code of this process, which has nothing left to do.

    srun sends SIGTERM to the other tasks of a step as soon as one has ended with a code such as 75.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _build_parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    # argparse stops filling a list at the first option: train CONFIG --nproc-per-node 8 a.b=1
    if rest and hasattr(args, "overrides") and not any(argument.startswith("-") for argument in rest):
        args.overrides.extend(rest)
    elif rest:
        parser.error(f"unknown arguments {' '.join(rest)}")
    return args


def _build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser of the verb that is named, or of all verbs if none is."""
    parser = _Parser(
        prog=_PROGRAM,
        description="Pretrain visual language models on megatron-core: prepare data, train, convert, evaluate.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {megatron_vlm.__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", dest="verb", required=True)
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    for module in find_verbs(named) or find_verbs():
        module.add_parser(subparsers)
    return parser


def find_verbs(name: str | None = None) -> list[ModuleType]:
    """Return the module of the verb `name`, as a list that is empty if there is none; without a name, all verbs."""
    modules = [
        importlib.import_module(f"{_PACKAGE}.{found}") for found in module_names(_PACKAGE) if name in (None, found)
    ]
    return [module for module in modules if hasattr(module, "add_parser")]
