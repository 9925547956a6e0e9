"""A `megatron-vlm train` that is watched from outside: its processes, what it does, and what it leaves.

`tools/soak.py` and the tests of kills disturb runs with it.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_vlm.checkpoint.folder import checkpoint_path, checkpoints_folder, list_iterations
from megatron_vlm.checkpoint.manifest import has_all_files
from megatron_vlm.platform.files.durable import UNFINISHED
from megatron_vlm.platform.files.metrics import read_records
from megatron_vlm.platform.launch.heartbeat import Beat, Phase, read_beat

LOOK_SECONDS = 0.005
_DEATH_SECONDS = 10.0


class WatchedJob:
    """A job on this machine.

    Args:
        arguments: of `megatron-vlm train`: the configuration, settings, options.
        run_dir: of the run.
        temporary: folder for the temporary files of this run; the same for all its starts.
        log: file to which the job's output is appended.
        variables: for its environment.
        folder: in which it runs; None: the current one.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        run_dir: Path,
        temporary: Path,
        log: Path,
        variables: Mapping[str, str],
        folder: Path | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._folder: Path | None = None
        command = [sys.executable, "-m", "megatron_vlm", "train", *arguments, f"run_dir={run_dir}"]
        environment = {**os.environ, **variables, "TMPDIR": str(temporary)}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        self._seen: dict[int, psutil.Process] = {self.process.pid: psutil.Process(self.process.pid)}

    def is_running(self) -> bool:
        """Return whether the launcher runs."""
        return self.process.poll() is None

    def members(self) -> list[psutil.Process]:
        """Return the launcher, its ranks and all that these have started, and remember them."""
        with suppress(psutil.NoSuchProcess):
            launcher = self._seen[self.process.pid]
            self._seen.update({child.pid: child for child in launcher.children(recursive=True)})
        return [member for member in self._seen.values() if _is_alive(member)]

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks that run, in their order."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []

    def loader_workers(self) -> list[list[psutil.Process]]:
        """Return the processes that load data, all of each rank that has some.

        To kill one may be no fault: a validation that has all its batches does not miss its worker.
        """
        found = []
        for rank in self.ranks():
            with suppress(psutil.NoSuchProcess):
                found.append([child for child in rank.children() if "tracker" not in " ".join(child.cmdline())])
        return list(filter(None, found))

    def beat(self) -> Beat | None:
        """Return the last sign of life of rank 0; None before it runs."""
        for rank in self.ranks() if self._folder is None else ():
            with suppress(psutil.NoSuchProcess, ValueError):  # it is not a rank yet, but about to become one
                words = rank.cmdline()
                self._folder = Path(words[words.index("--report-folder") + 1])
        return read_beat(self._folder, 0) if self._folder is not None else None

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300.0) -> bool:
        """Return whether the condition comes true before the job ends.

        Raises:
            TimeoutError: neither happens in time.
        """
        deadline = time.monotonic() + seconds
        while self.is_running():
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:.0f} s, the job is at {self.beat()}")
            time.sleep(LOOK_SECONDS)
        return False

    def is_in(self, *phases: Phase) -> bool:
        """Return whether rank 0 is in one of these phases."""
        beat = self.beat()
        return beat is not None and beat.phase in phases

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        return any(True for _ in checkpoints_folder(self.run_dir).glob(f"iter_*{UNFINISHED}"))

    def wait_for_end(self, seconds: float) -> int | None:
        """Return the exit code of the launcher; None if the job does not end in time, and is then killed."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        self.kill_all()
        return None

    def kill_all(self) -> None:
        """Kill every process of the job."""
        for member in self.members():
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()

    def survivors(self) -> list[str]:
        """Return the processes that are still there some seconds after the end of the job."""
        left = psutil.wait_procs([member for member in self._seen.values() if _is_alive(member)], _DEATH_SECONDS)[1]
        return [f"process {member.pid}" for member in left if _is_alive(member)]

    def shared_memory(self) -> list[str]:
        """Return what processes of the job have left in shared memory; torch writes their ids into the names."""
        ids = {str(pid) for pid in self._seen}
        return [path.name for path in Path("/dev/shm").glob("*") if ids & set(path.name.split("_"))]


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass
class Losses:
    """The losses that the starts of one run have recorded, to the bit."""

    values: dict[int, str] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    """Iterations that were done twice, with another loss."""

    def read(self, run_dir: Path) -> int:
        """Read what the run has recorded; return its last iteration."""
        records, _ = read_records(run_dir)
        for record in records:
            if "loss_hex" not in record:
                continue
            iteration, value = record["iteration"], record["loss_hex"]
            if self.values.setdefault(iteration, value) != value:
                self.contradictions.append(f"iteration {iteration}: {self.values[iteration]}, then {value}")
        return max((record["iteration"] for record in records), default=0)


@dataclass
class KeptCheckpoints:
    """The checkpoints that a run had at one time, and the hash of each file."""

    run_dir: Path
    hashes: dict[int, dict[str, str]]

    @classmethod
    def of(cls, run_dir: Path) -> "KeptCheckpoints":
        """Read every complete checkpoint of the run."""
        whole = [one for one in list_iterations(run_dir) if has_all_files(checkpoint_path(run_dir, one))]
        return cls(run_dir, {one: _hash_files(checkpoint_path(run_dir, one)) for one in whole})

    def harm(self, keep_last: int) -> list[str]:
        """Return what has since become of them that should not: changed, or removed though there is nothing newer."""
        now = KeptCheckpoints.of(self.run_dir).hashes
        found = [f"checkpoint {one} has changed" for one in self.hashes if one in now and now[one] != self.hashes[one]]
        for one in self.hashes.keys() - now.keys():
            if sum(newer > one for newer in now) < keep_last:
                found.append(f"checkpoint {one} was removed, and only {sorted(now)} are left")
        return found


def _hash_files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def ledger_of(run_dir: Path) -> list[dict]:
    """Return what a run says of the samples of each iteration, with their ids."""
    entries = [json.loads(line) for line in (run_dir / "ledger" / "iterations.jsonl").read_text().splitlines()]
    ids, begin = (run_dir / "ledger" / "sample_ids.bin").read_bytes(), 0
    for entry in entries:
        size = 8 * entry["samples"]
        entry["ids"] = ids[begin : begin + size].hex()
        begin += size
    assert begin == len(ids)
    return entries
