"""Servers in environments of their own, and what this project answers to the same prompts."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vlm.config import ModelConfig, load_section
from tests.serving.reference import ROOT, write_run

START_SECONDS = 1800
"""vLLM imports for minutes on a busy machine."""


class Server:
    """A process that answers on a port of this machine."""

    def __init__(self, url: str) -> None:
        self._url = url

    def post(self, path: str, **request) -> dict:
        """Return the answer to a request."""
        body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self._url + path, body, headers), timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{path}: {error.code} {error.read().decode()[:2000]}")


@pytest.fixture(scope="session")
def python_of() -> Callable[[str], str]:
    """Return the interpreter of a server's environment, or skip: python_of("vllm")."""

    def find(name: str) -> str:
        folder = os.environ.get("SERVING_ENVS")
        python = (Path(folder) / name if folder else ROOT / f".venv-serving-{name}") / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no environment for {name}: bash tests/serving/run.sh {name} makes it")
        return str(python)

    return find


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server and waits for it: start(command); the word PORT becomes a free one."""
    with contextlib.ExitStack() as stack:

        def run(command: list[str], **environment: str) -> Server:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            log = tmp_path_factory.mktemp("server") / "log"
            command = [port if word == "PORT" else word for word in command]
            inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
            with log.open("w") as stream:
                process = subprocess.Popen(
                    command, stdout=stream, stderr=subprocess.STDOUT, env={**inherited, **environment}, cwd=log.parent
                )
            stack.callback(_stop, process)
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            return Server(f"http://127.0.0.1:{port}")

        yield run


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"{process.args[0]} did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def quickstart_model() -> ModelConfig:
    """Sizes of the quickstart's model; its tokenizer is another one."""
    return load_section(ModelConfig, ROOT / "examples" / "quickstart" / "base.yaml", "model")


@pytest.fixture(scope="session")
def make_run(tmp_path_factory) -> Callable[[ModelConfig], Path]:
    """Return a run with random weights: make_run(model)."""
    return lambda model: write_run(tmp_path_factory.mktemp("run"), model)
