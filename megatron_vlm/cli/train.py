"""`megatron-vlm train`: check everything that can be checked, then start and supervise the ranks of this node."""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from megatron_vlm.cli.options import add_config
from megatron_vlm.cli.values import local_path, positive
from megatron_vlm.config import ExitCode, TrainConfig, UsageError, derive_layout, load_config
from megatron_vlm.platform.files.events import END, START, record_event
from megatron_vlm.platform.files.run_folder import (
    EXIT_STATUS_NAME,
    METRICS_NAME,
    check_entries,
    hold_run_folder,
    read_run_folder,
)
from megatron_vlm.platform.launch.exit_status import (
    ExitStatus,
    describe_error,
    error_line,
    forget_exit_status,
    record_exit_status,
    say,
)
from megatron_vlm.platform.launch.job_end import Patience, explain_end, read_reports
from megatron_vlm.platform.launch.job_folder import job_folder
from megatron_vlm.platform.launch.launch import STOP_SIGNALS, NodeJob, find_free_port, run_node
from megatron_vlm.platform.launch.nodes import NodeLink
from megatron_vlm.platform.launch.silence import SilenceWatch
from megatron_vlm.platform.launch.slurm import SlurmNode, read_slurm_node
from megatron_vlm.platform.log_format import setup_logging
from megatron_vlm.platform.machine import check_requirements, count_cores, count_visible_gpus

logger = logging.getLogger(__name__)

_EPILOG = """\
example:
  megatron-vlm train examples/vila_7b/align.yaml run_dir=runs/align optimizer.lr=5e-4 --nproc-per-node 8

A run folder that holds a checkpoint is resumed. On a cluster, srun starts this once per node (examples/slurm).
With --replay N, the same command computes iteration N once more and logs the loss of each sample; it changes nothing.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train or resume one stage, on one machine or under SLURM",
        description="Train or resume one stage.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    parser.add_argument(
        "--nproc-per-node",
        type=positive,
        metavar="N",
        help="ranks on this machine; default: SLURM_GPUS_ON_NODE, else the visible GPUs, else 1",
    )
    parser.add_argument(
        "--replay",
        type=positive,
        metavar="ITERATION",
        help="train nothing: compute this iteration from the newest checkpoint before it, with the loss of each sample",
    )
    parser.add_argument(
        "--replay-from", type=local_path, metavar="CHECKPOINT", help="or from the weights of this checkpoint or run"
    )
    parser.set_defaults(run=run)


class _StoppedEarlyError(BaseException):
    """A signal that stops the job arrived before any rank was running."""


@dataclass(slots=True)
class _EarlyStop:
    """What a signal means before the ranks run, and after: then it must not keep their outcome from being recorded."""

    is_over: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self.is_over:
            raise _StoppedEarlyError(signal.Signals(number).name)


def run(args: argparse.Namespace) -> int:
    """Check the settings, start the ranks, wait for them, and report the outcome in one line."""
    setup_logging()
    stop = _EarlyStop()
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # What the shell has this process ignore, such as SIGINT in the background, stays ignored.
    previous = {number: handler for number, handler in previous.items() if handler is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, stop)
    try:
        return _run(args, stop)
    except _StoppedEarlyError as stopped:
        logger.info("stopped by %s before any rank was started", stopped)
        return ExitCode.INTERRUPTED if str(stopped) == signal.SIGINT.name else ExitCode.REQUEUE
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace, stop: _EarlyStop) -> int:
    if args.replay_from is not None and args.replay is None:
        raise UsageError("--replay-from names a checkpoint for --replay", fix="give --replay, too")
    config = load_config(TrainConfig, args.config, args.overrides)
    slurm = read_slurm_node(os.environ)
    num_gpus = count_visible_gpus(os.environ)
    num_workers = _num_workers(args.nproc_per_node, slurm, num_gpus)
    status_path = Path(config.run_dir) / EXIT_STATUS_NAME
    launch_id = slurm.launch_id if slurm else f"local-{os.getpid()}"
    is_first_node = slurm is None or slurm.node_rank == 0
    # Other nodes see the same folder, or one of their own that nobody else uses.
    records = args.replay is None
    with _run_folder(Path(config.run_dir), launch_id, changes=records) if is_first_node else nullcontext():
        # The status in the folder is that of the run, which a replay does not change.
        if is_first_node and records:
            forget_exit_status(status_path, launch_id)
        try:
            _check(config, num_workers=num_workers, num_gpus=num_gpus, num_nodes=slurm.num_nodes if slurm else 1)
            job = _node_job(args, config, slurm, num_workers)
            if is_first_node and records:
                ranks = job.num_workers * job.num_nodes
                record_event(config.run_dir, START, f"started on {ranks} ranks", job=launch_id, ranks=ranks)
            with _link(slurm, 60 * config.supervision.meeting_minutes) as nodes:
                status, speaks = _launch(config, job, nodes, stop)
            if is_first_node and records:
                _record_end(config.run_dir, status)
        except Exception as error:
            if records:
                _record(status_path, replace(describe_error(error), launch_id=launch_id))
            raise
        if records:
            _record(status_path, replace(status, launch_id=launch_id))
    if speaks:
        _say(status)
    return status.exit_code


def _run_folder(run_dir: Path, launch_id: str, *, changes: bool) -> AbstractContextManager[None]:
    return hold_run_folder(run_dir, launch_id) if changes else read_run_folder(run_dir)


def _num_workers(asked: int | None, slurm: SlurmNode | None, num_gpus: int) -> int:
    return asked or (slurm.num_gpus if slurm else None) or num_gpus or 1


def _check(config: TrainConfig, *, num_workers: int, num_gpus: int, num_nodes: int) -> None:
    """Raise every error that can be detected before a rank starts."""
    from megatron_vlm.checkpoint.folder import find_checkpoint, list_iterations
    from megatron_vlm.data.loading.checks import check_data

    derive_layout(config, num_workers * num_nodes)
    check_entries(config.run_dir)
    if not list_iterations(config.run_dir):
        config.check_start()
        if config.checkpoint.load_weights is not None:
            find_checkpoint(config.checkpoint.load_weights)
    check_requirements(config, num_gpus=num_gpus, num_workers=num_workers)
    check_data(config)


def _node_job(args: argparse.Namespace, config: TrainConfig, slurm: SlurmNode | None, num_workers: int) -> NodeJob:
    environment = dict(os.environ)
    if config.training.num_threads:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(config.training.num_threads)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // num_workers)))
    # MKL follows: with more threads than cores to run them on, its threads wait for each other by spinning.
    environment.setdefault("MKL_NUM_THREADS", environment["OMP_NUM_THREADS"])
    # megatron-core relies on this ordering to overlap communication with computation.
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if (slurm is None or slurm.num_nodes == 1) and sys.platform.startswith("linux"):
        # All ranks are on this machine: avoid looking up a host name that may not resolve.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    replay = [] if args.replay is None else ["--replay", str(args.replay)]
    replay += [] if args.replay_from is None else ["--replay-from", str(args.replay_from)]
    return NodeJob(
        command=(sys.executable, "-m", "megatron_vlm.cli.worker", args.config, *args.overrides, *replay),
        environment=environment,
        num_workers=num_workers,
        node_rank=slurm.node_rank if slurm else 0,
        num_nodes=slurm.num_nodes if slurm else 1,
        master_address=slurm.master_address if slurm else "127.0.0.1",
        master_port=slurm.master_port if slurm and slurm.num_nodes > 1 else find_free_port(),
    )


@contextmanager
def _link(slurm: SlurmNode | None, meeting_seconds: float) -> Iterator[NodeLink | None]:
    """Yield the link to the other nodes; None if there are none."""
    if slurm is None or slurm.num_nodes == 1:
        yield None
        return
    nodes = NodeLink(
        launch_id=slurm.launch_id,
        node_rank=slurm.node_rank,
        num_nodes=slurm.num_nodes,
        address=slurm.master_address,
        port=slurm.launcher_port,
        meeting_seconds=meeting_seconds,
    )
    nodes.open()
    try:
        yield nodes
    finally:
        nodes.close()


def _launch(config: TrainConfig, job: NodeJob, nodes: NodeLink | None, stop: _EarlyStop) -> tuple[ExitStatus, bool]:
    """Run the ranks of this node; return how the whole job ended, and whether this node is the one to say so."""
    first = job.node_rank * job.num_workers
    if job.num_nodes > 1:
        logger.info(
            "node %d of %d: starting ranks %d to %d, meeting at %s:%d",
            job.node_rank,
            job.num_nodes,
            first,
            first + job.num_workers - 1,
            job.master_address,
            job.master_port,
        )
    with job_folder() as folder:
        options = ("--report-folder", str(folder), "--launcher-pid", str(os.getpid()))
        start = time.time()
        minutes = config.parallel.distributed_timeout_minutes
        watch = SilenceWatch(folder, config.supervision, minutes)
        end = run_node(replace(job, command=(*job.command, *options)), watch, nodes)
        stop.is_over = True
        patience = Patience(
            seconds=60 * minutes,
            last_progress=max(start, _last_written(Path(config.run_dir) / METRICS_NAME)),
        )
        status = explain_end(end, read_reports(folder, range(first, first + job.num_workers)), patience)
    return nodes.settle(status) if nodes is not None else (status, True)


def _last_written(path: Path) -> float:
    """Return when the file was last written [Unix time]; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _record(path: Path, status: ExitStatus) -> None:
    """Write the exit status; a full or missing disk must not hide how the job ended."""
    try:
        record_exit_status(path, status)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error.strerror)


def _record_end(run_dir: str, status: ExitStatus) -> None:
    what = f"ended with exit code {status.exit_code}" + (f": {status.message}" if status.message else "")
    record_event(run_dir, END, what, iteration=status.iteration, exit_code=status.exit_code, rank=status.rank)


def _say(status: ExitStatus) -> None:
    if status.traceback:
        say(status.traceback)
    if status.exit_code in (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
        if status.message:
            logger.info("%s", status.message)
        return
    say(error_line(status.message) + "\n")
