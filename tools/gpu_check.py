"""Check and measure one GPU in at most 8 minutes: tests, layers of VILA-7B, the loader, and `plan` beside it.

    bash tools/setup_venv.sh && .venv/bin/python tools/gpu_check.py --output gpu_check.json

Runs the tests marked `gpu`, then forward and backward passes of a row of 4,096 tokens with 6 images through the tower
and 4 decoder layers of examples/vila_7b (bf16 with torch's layers and with transformer-engine's, FP8 where the GPU has
it), an optimizer step with its memory, and decoding on the CPU. Each section is a process with a time limit; one that
fails is recorded and does not stop the others. `--device cpu` with small sizes tries the same code without a GPU.

Exit status: 0 done, 1 a section failed or ran out of time, 78 no GPU.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480
"""Limit of the whole check."""
_NOT_POSSIBLE = 78
_PACKAGES = ("megatron-vlm", "torch", "megatron-core", "transformer-engine", "flash-attn", "triton")
_TAIL = 2000


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the check."""

    name: str
    limit: int
    """Seconds."""
    options: tuple[str, ...] = ()
    """Of gpu_sections.py; none for the tests."""


SECTIONS = (
    Section(name="tests", limit=240),
    Section(name="layers_bf16", limit=80, options=("layers", "--backend", "torch")),
    Section(name="layers_bf16_transformer_engine", limit=60, options=("layers", "--backend", "transformer_engine")),
    Section(
        name="layers_fp8_transformer_engine",
        limit=60,
        options=("layers", "--backend", "transformer_engine", "--fp8", "hybrid"),
    ),
    Section(name="loader", limit=30, options=("loader",)),
)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="JSON file (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--config", type=Path, default=ROOT / "examples/vila_7b/pretrain.yaml", help="of the model")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: %(default)s)")
    parser.add_argument("--images", type=int, default=6, help="in the row (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="passes, of which the median counts")
    parser.add_argument("--sections", nargs="+", choices=[section.name for section in SECTIONS], help="only these")
    parser.add_argument(
        "--tests", nargs="+", default=["tests/test_devices.py"], help="test files (default: %(default)s)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings of the model")
    return parser.parse_args()


def find_machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": _versions(),
        "commit": _commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["capability"] = [properties.major, properties.minor]
        facts["memory_gib"] = properties.total_memory / 2**30
        facts["processors"] = properties.multi_processor_count
    return facts


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def run_section(section: Section, arguments: argparse.Namespace, seconds: float, folder: Path) -> dict[str, Any]:
    """Run a section in a process of its own and return its record: status, seconds, and result or reason."""
    result, log = folder / f"{section.name}.json", folder / f"{section.name}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = _command(section, arguments, result)
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the children of the section end with it
            process.wait()
    record: dict[str, Any] = {"status": _status(code), "seconds": round(time.monotonic() - start, 1)}
    if result.exists():
        record["result"] = _read_tests(result) if section.name == "tests" else json.loads(result.read_text())
    if code != 0:
        record["reason"] = log.read_text(errors="replace")[-_TAIL:].strip()
    return record


def _status(code: int | None) -> str:
    return {None: "out of time", 0: "done", _NOT_POSSIBLE: "not possible here"}.get(code, "failed")


def _command(section: Section, arguments: argparse.Namespace, result: Path) -> list[str]:
    if not section.options:
        marker = "gpu" if arguments.device == "cuda" else "not gpu and not slow"
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
        return [*pytest, f"--junitxml={result}", *arguments.tests]
    sizes = {"layers": arguments.layers, "images": arguments.images, "rounds": arguments.rounds}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    files = [f"--result={result}", f"--config={arguments.config.resolve()}"]
    return [
        sys.executable,
        str(ROOT / "tools" / "gpu_sections.py"),
        *section.options,
        *files,
        *options,
        "--set",
        *arguments.set,
    ]


def _read_tests(junit: Path) -> dict[str, Any]:
    """Return counts, and the names of the tests that failed or were skipped with the reason, from pytest's report."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in cases:
        bad, skipped = [child for child in case if child.tag in ("failure", "error")], case.find("skipped")
        if bad:
            found["failed"][case.get("name")] = (bad[0].get("message") or "")[:500]
        elif skipped is not None:
            found["skipped"][case.get("name")] = skipped.get("message")
        else:
            found["passed"] += 1
    return found


def summarise(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what follows from several sections: the fastest layers, and the loader's workers that feed a GPU."""
    rows = {
        name: section["result"]["whole_model"]["seconds_per_row"]
        for name, section in sections.items()
        if name.startswith("layers") and "result" in section
    }
    summary: dict[str, Any] = {"seconds_per_row": rows}
    loader = sections.get("loader", {}).get("result")
    if rows and loader:
        fastest = min(rows, key=lambda name: rows[name])
        summary["fastest"] = fastest
        summary["loader_workers_per_gpu"] = 1 / rows[fastest] / loader["rows_per_second"]
    return summary


def describe(record: dict[str, Any]) -> str:
    """Return a line about a finished section."""
    result = record.get("result", {})
    if record["status"] != "done":
        lines = record["reason"].splitlines() or ["no reason given"]
        return f"{record['status']}: {lines[-1][:200]}"
    if "passed" in result:
        return f"{result['passed']} passed, {len(result['failed'])} failed, {len(result['skipped'])} skipped"
    if "rows_per_second" in result:
        return f"{result['rows_per_second']:.2f} rows a second and worker"
    mfu = "unknown" if result["mfu"] is None else f"{result['mfu']:.1%}"
    share, peak = result["whole_model"]["tower_share"], result["optimizer_step"]["peak_gib"]
    memory = "" if peak is None else f", peak {peak:.1f} GiB for {result['optimizer_step']['planned_gib']:.1f} planned"
    return f"{result['layer_ms']:.2f} ms a layer, MFU {mfu}, tower {share:.1%} of the whole model{memory}"


def check(arguments: argparse.Namespace, chosen: Sequence[Section]) -> int:
    """Run the sections, write the file after each, and return the exit status."""
    end = time.monotonic() + SECONDS
    report: dict[str, Any] = {"machine": find_machine(arguments.device), "sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        for number, section in enumerate(chosen, 1):
            seconds = max(1.0, min(section.limit, end - time.monotonic()))
            sys.stdout.write(f"[{number}/{len(chosen)}] {section.name}, at most {seconds:.0f} s ... ")
            sys.stdout.flush()
            record = run_section(section, arguments, seconds, Path(folder))
            report["sections"][section.name] = record
            report["summary"] = summarise(report["sections"])
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
            sys.stdout.write(f"{describe(record)} ({record['seconds']} s)\n")
    sys.stdout.write(f"written to {arguments.output}\n")
    good = {"done", "not possible here"}
    return 0 if all(record["status"] in good for record in report["sections"].values()) else 1


def main() -> int:
    """Run the check."""
    arguments = parse()
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.stderr.write(
                "no GPU is visible to torch, so nothing is checked; --device cpu tries the code without one\n"
            )
            return _NOT_POSSIBLE
    chosen = [section for section in SECTIONS if arguments.sections is None or section.name in arguments.sections]
    return check(arguments, chosen)


if __name__ == "__main__":
    sys.exit(main())
