"""Run tasks on a Ray cluster: the same functions as in processes, on as many machines as it has."""

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
    """Connect to a Ray cluster, or start one on this machine; yield what runs tasks on it, as `run_tasks` does.

    The tasks name files, not their content: input and output must be on a file system that all nodes share under the
    same paths, and this package must be installed on all of them.

    Args:
        address: of the cluster, `host:port`, `auto` or `ray://host:port`; None starts one for this process alone.
        num_workers: processes of a cluster that is started here; another one has as many as it has cores.

    Raises:
        ConfigError: Ray is not installed, or no such cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--distributor ray needs the package ray, which is not installed",
            fix="pip install 'megatron_vlm[ray]', or leave --distributor out",
        ) from None
    if ray.is_initialized():  # by the program that calls this
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
        signal.signal(signal.SIGTERM, on_stop)  # Ray has put its own in the place of the program's
    try:
        yield functools.partial(_run, ray)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Find out within seconds that nobody is there; Ray itself tries for minutes and then ends the process."""
    host, mark, port = address.rpartition("://")[2].rpartition(":")
    if not mark:
        return  # a name of Ray's own, such as auto
    if not port.isdecimal() or int(port) > _LAST_PORT:  # the system would take the remainder for a port
        raise _no_cluster(address, f"{port!r} is no port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster can be used: {why[:120]}",
        where=address,
        fix="check --ray-address or RAY_ADDRESS; set RAY_AUTH_MODE=token if the cluster wants a token",
    )


class Progress:
    """What was done and what was rejected, by task: what is run again after the death of a node counts once."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[int, int]] = {}

    def start(self, task: int) -> None:
        """Begin a task, perhaps not for the first time."""
        self._done[task] = (0, 0)

    def add(self, task: int, done: int, rejects: int) -> None:
        """Count more."""
        before = self._done.get(task, (0, 0))
        self._done[task] = (before[0] + done, before[1] + rejects)

    def totals(self) -> tuple[int, int]:
        """Return what was done and what was rejected."""
        return sum(done for done, _ in self._done.values()), sum(rejects for _, rejects in self._done.values())


def _run(ray: Any, function: Callable, tasks: Sequence[tuple], *, unit: str, reports: bool = False) -> list[Any]:
    progress = ray.remote(num_cpus=0, max_restarts=-1)(Progress).remote() if reports else None
    call = ray.remote(_call)
    results = [call.remote(function, absolute_paths(task), number, progress) for number, task in enumerate(tasks)]
    pending = list(results)
    try:
        with tqdm(unit=f" {unit}", disable=None, mininterval=_POLL_SECONDS) as bar:
            while pending:
                # One that has failed is ready as well: its error is raised here, the others are not waited for.
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
            f"a worker or node of the Ray cluster died, also when tried again: {type(error).__name__}",
            fix="run the same command again, with more memory a node if that was short; finished input files are kept",
        ) from error
    finally:
        for task in pending:
            ray.cancel(task)


def _show(ray: Any, bar: tqdm, progress: Any, finished: int) -> None:
    if progress is None:
        bar.update(finished - bar.n)
        return
    # The count is for show: it may die with its node, and begins again then.
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
        ray.get(progress.totals.remote(), timeout=_POLL_SECONDS)  # comes after all that was added
    return result


def absolute_paths(value: Any) -> Any:
    """Return the same with every path absolute, also inside of tuples and dataclasses: nodes have their own folders."""
    if isinstance(value, Path):
        return value if value.is_absolute() else value.absolute()
    if isinstance(value, tuple):
        changed = [absolute_paths(item) for item in value]
        if all(new is old for new, old in zip(changed, value, strict=True)):
            return value
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed_fields = {name: absolute_paths(item) for name, item in fields.items()}
    different = {name: item for name, item in changed_fields.items() if item is not fields[name]}
    return dataclasses.replace(value, **different) if different else value
