import argparse
import errno
import subprocess
import sys
import types

import pytest

import megatron_vlm.cli as package
from megatron_vlm.cli import main as cli
from megatron_vlm.config import ConfigError, DataError


@pytest.fixture
def verb(monkeypatch):
    """Make `train` do what the test says: `verb(function)`."""

    def replace(function):
        def add_parser(subparsers):
            parser = subparsers.add_parser("train")
            parser.add_argument("config")
            parser.add_argument("overrides", nargs="*")
            parser.add_argument("--nproc-per-node", type=int)
            parser.set_defaults(run=function)

        monkeypatch.setitem(sys.modules, "megatron_vlm.cli.train", types.SimpleNamespace(add_parser=add_parser))

    return replace


def raising(error):
    def run(args):
        raise error

    return run


def test_verb_gets_its_arguments_and_returns_the_exit_code(verb):
    seen = {}
    verb(lambda args: seen.update(vars(args)) or 75)
    assert cli.main(["train", "a.yaml", "x.y=1", "--nproc-per-node", "4"]) == 75
    assert (seen["config"], seen["overrides"], seen["nproc_per_node"]) == ("a.yaml", ["x.y=1"], 4)


def test_overrides_may_follow_an_option(verb):
    seen = {}
    verb(lambda args: seen.update(vars(args)) or 0)
    assert cli.main(["train", "a.yaml", "x=1", "--nproc-per-node", "4", "y=2", "z=3"]) == 0
    assert seen["overrides"] == ["x=1", "y=2", "z=3"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("bad", where="a.yaml:3", fix="good"), 78, "megatron-vlm: error: bad (a.yaml:3); fix: good\n"),
        (DataError("bad"), 65, "megatron-vlm: error: bad\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            74,
            "megatron-vlm: error: No space left on device (/data/x); fix: check free space and permissions of the "
            "folder\n",
        ),
    ],
)
def test_error_is_one_line_with_its_exit_code(verb, capsys, error, code, line):
    verb(raising(error))
    assert cli.main(["train", "a.yaml"]) == code
    assert capsys.readouterr().err == line


def test_interrupt_is_quiet(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["train", "a.yaml"]) == 130
    assert capsys.readouterr().err == ""


def test_unforeseen_error_keeps_its_traceback(verb):
    verb(raising(ZeroDivisionError("x")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "a.yaml"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: config"),
        (["train", "a.yaml", "--bogus"], "unknown option --bogus"),
        (["train", "a.yaml", "--nproc-per-node", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_command_line_is_one_line_with_exit_code_64(verb, capsys, arguments, message):
    verb(lambda args: 0)
    assert cli.main(arguments) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-vlm: error: ")
    assert message in line
    assert "--help" in line


def test_mistyped_option_is_named_before_what_is_missing(verb, capsys):
    verb(lambda args: 0)
    assert cli.main(["train", "--nproc-pre-node", "2"]) == 64
    assert "unknown option --nproc-pre-node; fix: did you mean --nproc-per-node?" in capsys.readouterr().err


def test_reader_that_leaves_early_is_no_error():
    code = (
        "import sys, types\nfrom megatron_vlm.cli import main as cli\n"
        "def run(args):\n    sys.stdin.read()\n    sys.stdout.write('x' * 10**6)\n    return 0\n"
        "def add_parser(subparsers):\n    subparsers.add_parser('train').set_defaults(run=run)\n"
        "sys.modules['megatron_vlm.cli.train'] = types.SimpleNamespace(add_parser=add_parser)\n"
        "sys.exit(cli.main(['train']))"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    process.stdin.close()  # now it writes
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (141, "")


def test_signal_after_the_end_does_not_replace_the_exit_code():
    code = (
        "import atexit, os, signal, sys\n"
        "from types import SimpleNamespace\n"
        "from megatron_vlm.cli import main as cli\n"
        "atexit.register(lambda: [os.kill(os.getpid(), one) for one in (signal.SIGTERM, signal.SIGUSR1)])\n"
        "cli._parse = lambda arguments: SimpleNamespace(run=lambda args: 75)\n"
        "sys.exit(cli.main())\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 75


@pytest.mark.parametrize("command", [["megatron_vlm", "train"], ["megatron_vlm.cli.worker"]])
def test_log_on_a_full_disk_does_not_replace_the_exit_code(command, tmp_path):
    with open("/dev/full", "w") as full:
        code = subprocess.call([sys.executable, "-m", *command, str(tmp_path / "missing.yaml")], stderr=full)
    assert code == 78


def test_version_is_printed():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vlm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("megatron-vlm ")


VERBS = [module.__name__.rpartition(".")[2] for module in cli.find_verbs()]
# Importing any of these takes longer than showing the help of a verb may take.
HEAVY = ("torch", "numpy", "pyarrow", "transformers", "megatron.core", "matplotlib", "fsspec", "PIL", "ray", "scipy")


def leaf_commands() -> list[list[str]]:
    """Return every command that runs something, e.g. ["data", "verify"]."""
    found = []

    def visit(parser: argparse.ArgumentParser, words: list[str]) -> None:
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in below:
            for name, child in action.choices.items():
                visit(child, [*words, name])
        if not below:
            found.append(words)

    visit(cli._build_parser([]), [])
    return found


def test_verbs_are_the_modules_of_the_folder():
    assert {"prepare", "select", "data", "plan", "train", "checkpoint", "convert", "evaluate", "generate"} <= set(VERBS)
    assert not {"main", "options", "values", "worker"} & set(VERBS)


def test_a_verb_is_added_without_editing_a_file(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(
        "def add_parser(subparsers):\n    subparsers.add_parser('toy').set_defaults(run=lambda args: 75)\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "megatron_vlm.cli.toy", raising=False)
    assert cli.main(["toy"]) == 75


@pytest.mark.parametrize("words", [*([verb] for verb in VERBS), *leaf_commands()], ids=" ".join)
def test_help_shows_a_real_example_of_the_command(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    assert f"\n  megatron-vlm {' '.join(words)} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--decode"], "option --decode stands too early; fix: put it after the ACTION"),
        (["prepare", "--input", "x", "text"], "option --input stands too early; fix: put it after the KIND"),
        (["--versoin"], "unknown option --versoin; fix: did you mean --version?"),
    ],
)
def test_an_option_before_the_action_is_named_before_what_is_missing(arguments, message, capsys):
    assert cli.main(arguments) == 64
    assert message in capsys.readouterr().err


def test_words_after_two_dashes_are_no_options(verb):
    seen = {}
    verb(lambda args: seen.update(vars(args)) or 0)
    assert cli.main(["train", "--", "--odd-name.yaml"]) == 0
    assert seen["config"] == "--odd-name.yaml"


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom megatron_vlm.cli.main import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"sys.exit(' '.join(name for name in {HEAVY} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: megatron-vlm")
