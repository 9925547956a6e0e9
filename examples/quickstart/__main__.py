"""The quickstart: `bash examples/quickstart/run.sh [--smoke] [--fresh] [--output FOLDER]`."""

import argparse
import shutil
import sys
from pathlib import Path

from megatron_vlm.config import ExitCode, UserError
from quickstart.phases import PhaseRunner
from quickstart.pipeline import NUM_PHASES, Quickstart, write_results
from quickstart.processes import CommandError
from quickstart.size import REAL, SMOKE
from quickstart.stages import DEFAULT_OUTPUT


def main() -> int:
    """Run all phases, print what was found, and return 0 only if every bar is met."""
    parser = argparse.ArgumentParser(prog="run.sh", description="The whole path on real input, on this machine.")
    parser.add_argument("--smoke", action="store_true", help="2 minutes on 2 processes, too short to be accurate")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before; downloads are kept")
    parser.add_argument(
        "--output", type=Path, help=f"folder to write to; default {DEFAULT_OUTPUT}, with --smoke {DEFAULT_OUTPUT}-smoke"
    )
    args = parser.parse_args()
    output = args.output or Path(f"{DEFAULT_OUTPUT}-smoke" if args.smoke else DEFAULT_OUTPUT)
    if args.fresh:
        _forget(output)
    output.mkdir(parents=True, exist_ok=True)
    phases = PhaseRunner(folder=output / "phases", num_phases=NUM_PHASES, say=_say)
    quickstart = Quickstart(output=output, size=SMOKE if args.smoke else REAL, smoke=args.smoke, phases=phases)
    try:
        summary = write_results(quickstart.run(), output)
    except UserError as error:
        _say(f"error: {error}")
        return int(error.exit_code)
    except CommandError as error:
        _say(f"error: {error}")
        return int(ExitCode.CRASH)
    except KeyboardInterrupt:
        _say("interrupted; run again to go on")
        return int(ExitCode.INTERRUPTED)
    return _conclude(summary, output)


def _forget(output: Path) -> None:
    for path in output.glob("*"):
        if path.name == "downloads":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _conclude(summary: dict, output: Path) -> int:
    _say("")
    for requirement in summary["requirements"]:
        mark = "met   " if requirement["met"] else "MISSED"
        _say(f"{mark} {requirement['name']}: {requirement['found']} (required: {requirement['required']})")
    accuracy, guessing = summary["test_accuracy"], summary["controls"]
    _say(f"test accuracy {accuracy:.4f} on {summary['test_questions']:,} questions; controls: ", end="")
    _say(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in guessing.items()))
    _say(f"{summary['seconds_total'] / 60:.1f} minutes in all; {output / 'summary.json'}")
    _say(f"report: {(output / 'report.html').resolve()}")
    return int(ExitCode.DONE if summary["passed"] else ExitCode.CRASH)


def _say(line: str, end: str = "\n") -> None:
    sys.stdout.write(f"{line}{end}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
