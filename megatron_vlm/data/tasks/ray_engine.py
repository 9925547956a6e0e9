"""Run tasks on a Ray cluster: the same functions as in processes, on all of its machines."""

import contextlib
import dataclasses
import functools
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vlm.config import ConfigError, StorageError
from megatron_vlm.data.tasks.processes import Engine

_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_LAST_PORT = 65535


@contextmanager
def ray_cluster(address: str | None, *, num_workers: int) -> Iterator[Engine]:
    """Connect to a Ray cluster, or start one on this machine; yield a function that runs tasks on it like `run_tasks`.

    Tasks contain the paths of files, not their content: input and output must be on a file system that all nodes share
    under the same paths, and this package must be installed on all nodes.

    Args:
        address: the cluster, `host:port`, `auto` or `ray://host:port`; None starts one for this process.
        num_workers: processes of a cluster that is started here; others have as many as they have cores.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--distributor ray needs the package ray, which is not installed",
            fix="pip install 'megatron_vlm[ray]', or leave --distributor out",
        ) from None
    if ray.is_initialized():  # by the calling program
        yield functools.partial(_run, ray)
        return
    quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_stop = signal.getsignal(signal.SIGTERM)
    if address is None:
        ray.init(address="local", num_cpus=num_workers, include_dashboard=False, **quiet)
    else:
        _check_answers(address)
        try:
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise _no_cluster(address, str(error)) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_stop)  # Ray has replaced the handler of the program
    try:
        yield functools.partial(_run, ray)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Find out within seconds if nobody answers; Ray itself tries for minutes and then ends the process."""
    host, mark, port = address.rpartition("://")[2].rpartition(":")
    if not mark:
        return  # a name that Ray interprets, such as auto
    if not port.isdecimal() or int(port) > _LAST_PORT:  # the system would take it modulo 65536
        raise _no_cluster(address, f"{port!r} is not a port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster can be used: {why[:120]}",
        where=address,
        fix="check --ray-address or RAY_ADDRESS; set RAY_AUTH_MODE=token if the cluster wants a token",
    )


class Progress:
    """Numbers of things done and rejected, by task: a task that is run again after a node died counts once."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[int, int]] = {}

    def start(self, task: int) -> None:
        """Start a task, possibly again."""
        self._done[task] = (0, 0)

    def add(self, task: int, done: int, rejects: int) -> None:
        """Add to the numbers of a task."""
        before = self._done.get(task, (0, 0))
        self._done[task] = (before[0] + done, before[1] + rejects)

    def totals(self) -> tuple[int, int]:
        """Return the numbers of things done and rejected by all tasks."""
        return sum(done for done, _ in self._done.values()), sum(rejects for _, rejects in self._done.values())


def _run(ray: Any, function: Callable, tasks: Sequence[tuple], *, unit: str, reports: bool = False) -> list[Any]:
    progress = ray.remote(num_cpus=0, max_restarts=-1)(Progress).remote() if reports else None
    call = ray.remote(_call)
    results = [call.remote(function, absolute_paths(task), number, progress) for number, task in enumerate(tasks)]
    pending = list(results)
    try:
        with tqdm(unit=f" {unit}", disable=None, mininterval=_POLL_SECONDS) as bar:
            while pending:
                # A failed task is ready as well: its error is raised here, without waiting for the others.
                ready, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_SECONDS)
                ray.get(ready)
                _show(ray, bar, progress, len(tasks) - len(pending))
        return ray.get(results)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
            raise ConfigError(
                f"nodes of the Ray cluster cannot run the tasks: {str(error.cause).splitlines()[0]}",
                fix="install this version of megatron_vlm, with the same Python, on all nodes",
            ) from None
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise StorageError(
            f"a worker or node of the Ray cluster died, also after retries: {type(error).__name__}",
            fix="run the same command again, with more memory per node if it is short; finished input files are kept",
        ) from error
    finally:
        for task in pending:
            ray.cancel(task)


def _show(ray: Any, bar: tqdm, progress: Any, finished: int) -> None:
    if progress is None:
        bar.update(finished - bar.n)
        return
    # The progress is only for display: it may die with its node, and then starts again.
    with contextlib.suppress(ray.exceptions.RayError):
        done, rejects = ray.get(progress.totals.remote(), timeout=_POLL_SECONDS)
        bar.set_postfix(rejects=rejects, refresh=False)
        bar.update(done - bar.n)


def _call(function: Callable, task: tuple, number: int, progress: Any) -> Any:
    """Run one task on a node."""
    if progress is None:
        return function(*task)
    import ray

    progress.start.remote(number)
    result = function(*task, functools.partial(progress.add.remote, number))
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(progress.totals.remote(), timeout=_POLL_SECONDS)  # is answered after all earlier calls
    return result


def absolute_paths(value: Any) -> Any:
    """Return the value with absolute paths, also in tuples and dataclasses: nodes have other working directories."""
    if isinstance(value, Path):
        return value.absolute()
    if isinstance(value, tuple):
        items = [absolute_paths(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: absolute_paths(item) for name, item in fields.items()})
