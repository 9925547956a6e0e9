"""Explain in one line why a job ended, from the exit codes and reports of its ranks."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vlm.config import ExitCode
from megatron_vlm.platform.launch.exit_status import ExitStatus, read_exit_status
from megatron_vlm.platform.launch.launch import STOP_SIGNALS, NodeEnd, WorkerEnd
from megatron_vlm.platform.launch.nodes import name_nodes
from megatron_vlm.platform.launch.silence import SilentRank

_CONSEQUENCES = (ExitCode.CRASH, ExitCode.TIMEOUT)
_ORDERLY_STOP = (ExitCode.DONE, ExitCode.REQUEUE, ExitCode.INTERRUPTED)


def report_path(folder: Path, rank: int) -> Path:
    """Return the file in which a rank reports how it ended."""
    return folder / f"rank_{rank:05d}.json"


def read_reports(folder: Path, ranks: Sequence[int]) -> dict[int, ExitStatus]:
    """Return the reports of the ranks; those that left none are missing."""
    found = {rank: read_exit_status(report_path(folder, rank)) for rank in ranks}
    return {rank: report for rank, report in found.items() if report is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a collective may take, and since when none is known to have completed."""

    seconds: float
    last_progress: float
    """End of the last step, or start of the job [Unix time]."""

    def is_over(self, worker: WorkerEnd) -> bool:
        """Return whether NCCL's watchdog may have ended the rank: it aborts a process whose collective takes too long.

        Its message goes to the rank's own stderr, so only the time tells: an abort for another reason, such as an
        illegal access, follows a step sooner.
        """
        return worker.exit_code == -signal.SIGABRT and worker.unix_time - self.last_progress >= self.seconds


def explain_end(end: NodeEnd, reports: Mapping[int, ExitStatus], patience: Patience | None = None) -> ExitStatus:
    """Return the status of the whole node.

    A foreseen error takes precedence. Then counts what happened first of a rank that was killed from outside and a
    crash; then a rank that hangs; then what follows from any of them: waits in vain, aborts, lost connections.

    Args:
        end: the ranks in the order in which they ended.
        reports: written by the ranks before they ended.
        patience: tells an abort of NCCL's watchdog from others; None: no abort is its.
    """
    iteration = max((report.iteration or 0 for report in reports.values()), default=None)
    failures = [
        worker for worker in end.workers if worker.exit_code not in _ORDERLY_STOP and not worker.was_killed_here
    ]
    status = _foreseen(failures, reports)
    if status is None and end.stop_signal is not None and end.silent is None and _all_stopped(end, failures):
        status = _stopped(end.stop_signal, end.workers, reports)
    if status is None:
        status = _first_cause(end, failures, reports, patience) or _orderly(end.workers, reports)
    return replace(status, iteration=iteration)


def _first_cause(
    end: NodeEnd, failures: Sequence[WorkerEnd], reports: Mapping[int, ExitStatus], patience: Patience | None
) -> ExitStatus | None:
    if end.missing:
        return _missing(end.missing)
    timed_out = [worker for worker in failures if _is_timeout(worker, patience)]
    others = [worker for worker in failures if worker not in timed_out]
    aborts = [worker for worker in others if worker.exit_code == -signal.SIGABRT]
    own = [worker for worker in others if worker not in aborts and not _is_symptom(worker, reports)]
    return (
        _first_death(own, reports)
        or _silent(end.silent)
        or _waited(timed_out, end.workers)
        or _killed(aborts)
        or _crashed(others, reports)
    )


def _is_symptom(worker: WorkerEnd, reports: Mapping[int, ExitStatus]) -> bool:
    report = reports.get(worker.rank)
    return report is not None and report.is_symptom


def _first_death(workers: Sequence[WorkerEnd], reports: Mapping[int, ExitStatus]) -> ExitStatus | None:
    """Return what ended the first of the ranks that did not end because of another."""
    killed = [worker for worker in workers if worker.signal_name is not None]
    told = [worker for worker in workers if worker not in killed and worker.rank in reports]
    if killed and all(killed[0].unix_time <= reports[worker.rank].unix_time for worker in told):
        return _killed(killed)
    return _crashed(told, reports) or _crashed(workers, reports)


def _silent(silent: SilentRank | None) -> ExitStatus | None:
    if silent is None:
        return None
    return ExitStatus(
        exit_code=int(ExitCode.TIMEOUT),
        message=f"{silent.message}; fix: start the same command again, it resumes from the last checkpoint",
        rank=silent.rank,
        traceback=f"{silent.stack.rstrip()}\n" if silent.stack else None,
        is_symptom=silent.is_waiting,
    )


def _missing(nodes: Sequence[int]) -> ExitStatus:
    return ExitStatus(
        exit_code=int(ExitCode.TIMEOUT),
        message=f"{name_nodes(nodes)} did not come up within supervision.meeting_minutes; fix: look at those machines "
        "and at what their launchers print, then start the same command again",
    )


def _foreseen(failures: Sequence[WorkerEnd], reports: Mapping[int, ExitStatus]) -> ExitStatus | None:
    """Return the first error that has its own exit code."""
    for worker in failures:
        report = reports.get(worker.rank)
        if report is not None and report.severity == 4:
            return report
    for worker in failures:
        if worker.exit_code in set(ExitCode) and worker.exit_code not in _CONSEQUENCES:
            # The disk may be too full for a report, but the exit code still tells what happened.
            return ExitStatus(
                exit_code=worker.exit_code,
                message=f"rank {worker.rank} ended with exit code {worker.exit_code}; see its message above",
                rank=worker.rank,
            )
    return None


def _all_stopped(end: NodeEnd, failures: Sequence[WorkerEnd]) -> bool:
    """Return whether the ranks ended because they were asked to, and not because of an error.

    A rank that is asked before its handler is installed dies of the signal, whoever sent it; the others may lose their
    connection to it.
    """
    died_of_it = {worker.rank for worker in failures if -worker.exit_code in STOP_SIGNALS}
    killed_otherwise = any(worker.exit_code < 0 and worker.rank not in died_of_it for worker in failures)
    return not killed_otherwise and (bool(died_of_it) or not failures)


def _stopped(
    stop_signal: signal.Signals, workers: Sequence[WorkerEnd], reports: Mapping[int, ExitStatus]
) -> ExitStatus | None:
    if all(worker.exit_code == ExitCode.DONE for worker in workers):
        return None
    code = ExitCode.INTERRUPTED if stop_signal == signal.SIGINT else ExitCode.REQUEUE
    told = next((report.message for report in reports.values() if report.exit_code == ExitCode.REQUEUE), "")
    return ExitStatus(exit_code=int(code), message=told or f"stopped by {stop_signal.name}")


def _killed(failures: Sequence[WorkerEnd]) -> ExitStatus | None:
    for worker in failures:
        if worker.signal_name is None:
            continue
        hint = (
            "look for the out-of-memory killer in the system log"
            if worker.exit_code == -signal.SIGKILL
            else "see the stack it printed above"
        )
        return ExitStatus(
            exit_code=int(ExitCode.CRASH),
            message=f"rank {worker.rank} (process {worker.pid}) was killed by {worker.signal_name}; fix: {hint}, then "
            "start the same command again: it resumes from the last checkpoint",
            rank=worker.rank,
            is_symptom=worker.exit_code == -signal.SIGABRT,
        )
    return None


def _is_timeout(worker: WorkerEnd, patience: Patience | None) -> bool:
    return worker.exit_code == ExitCode.TIMEOUT or (patience is not None and patience.is_over(worker))


def _waited(timed_out: Sequence[WorkerEnd], workers: Sequence[WorkerEnd]) -> ExitStatus | None:
    """Return the end of a job whose ranks waited in vain, naming those of this node that did not wait."""
    if not timed_out:
        return None
    running = ", ".join(str(worker.rank) for worker in workers if worker.was_killed_here)
    what = f"rank {timed_out[0].rank} waited longer for other ranks than parallel.distributed_timeout_minutes"
    if timed_out[0].exit_code < 0:
        what += " (no step ended for that long, then it aborted)"
    others = f"; still running on this node: rank {running}" if running else ""
    return ExitStatus(
        exit_code=int(ExitCode.TIMEOUT),
        message=f"{what}{others}; fix: start the same command again, it resumes from the last checkpoint; if it "
        "happens again, look at what those ranks and their network do",
        rank=timed_out[0].rank,
        is_symptom=True,
    )


def _crashed(failures: Sequence[WorkerEnd], reports: Mapping[int, ExitStatus]) -> ExitStatus | None:
    if not failures:
        return None
    told = [worker for worker in failures if worker.rank in reports]
    first = min(told, key=lambda worker: reports[worker.rank].unix_time) if told else failures[0]
    report = reports.get(first.rank)
    if report is None:
        message = f"rank {first.rank} ended with exit code {first.exit_code}; see its output above"
        return ExitStatus(exit_code=int(ExitCode.CRASH), message=message, rank=first.rank)
    message = f"rank {first.rank} crashed: {report.message}"
    return replace(report, exit_code=int(ExitCode.CRASH), message=message, rank=first.rank)


def _orderly(workers: Sequence[WorkerEnd], reports: Mapping[int, ExitStatus]) -> ExitStatus:
    for worker in workers:
        if worker.exit_code == ExitCode.REQUEUE:
            told = reports.get(worker.rank)
            return ExitStatus(exit_code=int(ExitCode.REQUEUE), message=told.message if told else "asks to be requeued")
    return ExitStatus(exit_code=int(ExitCode.DONE), message="")
