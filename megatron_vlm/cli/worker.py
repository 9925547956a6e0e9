"""One rank of a training job: `python -m megatron_vlm.cli.worker CONFIG [section.key=value ...]`.

`megatron-vlm train` starts it; `torchrun --nproc-per-node N -m megatron_vlm.cli.worker CONFIG` works too. Processes
that a rank spawns import this file again, so it must not import anything heavy at the top.
"""

import argparse
import atexit
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from megatron_vlm.config import ExitCode, TrainConfig, load_config
from megatron_vlm.platform.files.metrics import read_last
from megatron_vlm.platform.files.run_folder import EXIT_STATUS_NAME
from megatron_vlm.platform.launch.environment import library_environment
from megatron_vlm.platform.launch.exit_status import (
    ExitStatus,
    describe_error,
    error_line,
    record_exit_status,
    say,
    write_exit_status,
)
from megatron_vlm.platform.launch.heartbeat import start_beating
from megatron_vlm.platform.launch.job_end import report_path
from megatron_vlm.platform.launch.job_folder import keep_helpers_in
from megatron_vlm.platform.launch.launch import STOP_SIGNALS
from megatron_vlm.platform.launch.parent import die_with_parent
from megatron_vlm.platform.launch.time_limit import is_time_over
from megatron_vlm.platform.log_format import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run this rank to its end, report the outcome, and return the exit code."""
    # Until training installs its own handlers, signals end the rank without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.enable()
    args = _parse(argv)
    if args.launcher_pid is not None:
        die_with_parent(args.launcher_pid)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    config = None
    try:
        if args.report_folder is not None:
            start_beating(args.report_folder, rank)
        keep_helpers_in(args.report_folder)
        config = load_config(TrainConfig, args.config, args.overrides)
        setup_logging(rank, world_size, speaking_ranks=_speaking_ranks(config, world_size))
        status = _train(config) if args.replay is None else _replay(config, args)
        for number in STOP_SIGNALS:  # all is saved: a repeated signal must not make this a failure
            signal.signal(number, signal.SIG_IGN)
    except (Exception, KeyboardInterrupt) as error:
        status = describe_error(error, None if config is None else config.run_dir)
    status = replace(status, rank=rank, iteration=_last_iteration(config))
    _report(status, config, args.report_folder)
    return status.exit_code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_vlm.cli.worker", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--report-folder", type=Path, help="folder in which the launcher expects the exit status of this rank"
    )
    parser.add_argument("--launcher-pid", type=int, help="end when this process, the parent, ends")
    parser.add_argument("--replay", type=int, help="compute this iteration once more instead of training")
    parser.add_argument("--replay-from", help="checkpoint or run whose weights are used for it")
    return parser.parse_args(argv)


def _prepare(config: TrainConfig) -> None:
    os.environ.update(library_environment(os.environ, config.training))
    from megatron_vlm.platform.device import prepare_process

    prepare_process()


def _replay(config: TrainConfig, args: argparse.Namespace) -> ExitStatus:
    _prepare(config)
    from megatron_vlm.training.replay import Replay, run_replay

    run_replay(config, Replay(iteration=args.replay, checkpoint=args.replay_from))
    return ExitStatus(exit_code=int(ExitCode.DONE), message="")


def _train(config: TrainConfig) -> ExitStatus:
    _prepare(config)
    from megatron_vlm.training.run import run_training
    from megatron_vlm.training.state import SIGNALLED

    if run_training(config) == SIGNALLED:
        minutes = config.training.exit_duration_minutes
        why = f"at training.exit_duration_minutes={minutes:g}" if minutes and is_time_over(minutes) else "by a signal"
        message = f"stopped {why} after saving a checkpoint; run the same command again to resume"
        return ExitStatus(exit_code=int(ExitCode.REQUEUE), message=message)
    return ExitStatus(exit_code=int(ExitCode.DONE), message="")


def _speaking_ranks(config: TrainConfig, world_size: int) -> set[int]:
    """Return the ranks that log: the first, and the first of the last pipeline stage, which has the loss."""
    return {0, world_size - world_size // config.parallel.pipeline_model_parallel_size}


def _last_iteration(config: TrainConfig | None) -> int | None:
    """Return the last iteration in the run's metrics; None if there is none."""
    if config is None:
        return None
    try:
        records = read_last(Path(config.run_dir), 1)
    except OSError:  # the disk, or run_dir is no folder: the report says so
        return None
    return records[0]["iteration"] if records else None


def _report(status: ExitStatus, config: TrainConfig | None, report_folder: Path | None) -> None:
    """Report to the launcher; without one, to the console and the run folder."""
    try:
        if report_folder is not None:
            write_exit_status(report_path(report_folder, status.rank or 0), status)
            return
        if config is not None:
            launch_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
            path = Path(config.run_dir) / EXIT_STATUS_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            record_exit_status(path, replace(status, launch_id=launch_id))
    except OSError as error:
        say(f"rank {status.rank}: the exit status could not be written: {error}\n")
    if status.traceback:
        say(status.traceback)
    if status.message:
        say(error_line(status.message) + "\n")


def _leave(exit_code: int) -> NoReturn:
    """End this process without taking it to pieces.

    Python would free every object of torch and megatron-core first, which takes seconds.
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # a log on a full disk must not keep this process, or replace its exit code
        os._exit(exit_code)


if __name__ == "__mp_main__":
    # A process that this rank spawned, such as megatron-core's checkpoint helper, which would outlive a killed rank.
    die_with_parent(os.getppid())

if __name__ == "__main__":
    _leave(main())
