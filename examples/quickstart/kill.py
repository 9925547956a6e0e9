"""Start a training run, kill one of its ranks with signal 9, and record how the job ended.

    python -m quickstart.kill RUN --rank 1 --after 120 --facts FILE -- megatron-vlm train ...

The run folder is removed first if it exists. FILE receives the exit code of the job, the seconds it took to end, and
the metrics that had been written by then.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_vlm.platform.files.metrics import read_metrics


def find_rank(launcher: int, rank: int) -> int | None:
    """Return the process id of a rank started by this launcher, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue  # the process has ended, or belongs to another user
    return None


def kill_rank(command: list[str], run: Path, *, rank: int, after: int) -> dict:
    """Run a command, kill one of its ranks after `after` iterations, and return how it ended.

    Raises:
        SystemExit: the command ended too early.
        subprocess.TimeoutExpired: the command did not end after the kill.
    """
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and max((one["iteration"] for one in read_metrics(run)), default=0) < after:
            time.sleep(0.2)
        victim = find_rank(process.pid, rank)
        if victim is None:
            sys.exit(f"error: the run ended before iteration {after}, at which rank {rank} was to be killed")
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        print(f"kill -9 {victim}: rank {rank} at iteration {after}", flush=True)
        exit_code = process.wait(120.0)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    seconds = time.monotonic() - start
    print(f"the job ended {seconds:.1f} s later with exit code {exit_code}")
    return {"rank": rank, "exit_code": exit_code, "seconds_to_end": seconds, "killed": read_metrics(run)}


def main() -> None:
    """Parse the command line, kill, and write the facts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--after", type=int, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the training run, too
    shutil.rmtree(args.run, ignore_errors=True)
    facts = kill_rank(args.command, args.run, rank=args.rank, after=args.after)
    args.facts.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
