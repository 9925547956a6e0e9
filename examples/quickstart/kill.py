"""Start a training, kill one of its ranks with signal 9 in the middle of it, and keep what was found.

    python -m quickstart.kill RUN --rank 1 --after 120 --facts FILE -- megatron-vlm train ...

A run folder that is there is removed first. FILE gets the exit code of the job, the seconds that it took to end, and
the metrics that the run had written when it died.
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

from megatron_vlm.training.run_records import read_metrics

_SECONDS_TO_DIE = 120.0


def find_rank(launcher: int, rank: int) -> int | None:
    """Return the process id of a rank that this launcher started; None where there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue  # it has ended meanwhile, or belongs to somebody else
    return None


def kill_rank(command: list[str], run: Path, *, rank: int, after: int) -> dict:
    """Run a command, kill a rank of it when `after` iterations are done, and return what happened.

    Raises:
        RuntimeError: the command ended before the kill, or did not end after it.
    """
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and max((one["iteration"] for one in read_metrics(run)), default=0) < after:
            time.sleep(0.2)
        victim = find_rank(process.pid, rank)
        if victim is None:
            raise RuntimeError(f"the run ended before iteration {after}, where rank {rank} was to be killed")
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        print(f"kill -9 {victim}: rank {rank} at iteration {after}", flush=True)
        exit_code = process.wait(_SECONDS_TO_DIE)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    seconds = time.monotonic() - start
    print(f"the job ended {seconds:.1f} s later with exit code {exit_code}")
    return {"rank": rank, "exit_code": exit_code, "seconds_to_end": seconds, "killed": read_metrics(run)}


def main() -> None:
    """Kill and write the facts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--after", type=int, required=True)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the training is ended, too
    shutil.rmtree(args.run, ignore_errors=True)
    facts = kill_rank(args.command, args.run, rank=args.rank, after=args.after)
    args.facts.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
