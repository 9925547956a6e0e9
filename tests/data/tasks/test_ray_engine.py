"""Preparation on a Ray cluster of this machine.

The slow tests need the extra: EXTRAS=dev,hf,ray bash tests/run.sh -m slow tests/data/tasks/test_ray_engine.py
"""

import importlib.util
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import ConfigError, DataError, StorageError
from megatron_vlm.data.tasks import ray_engine
from megatron_vlm.data.tasks.ray_engine import Progress, absolute_paths, ray_cluster
from tests.support.preparing import content


@pytest.fixture
def _no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("_no_ray")
def test_without_ray_the_extra_is_named():
    with (
        pytest.raises(ConfigError, match=r"not installed; fix: pip install 'megatron_vlm\[ray\]'"),
        ray_cluster(None, num_workers=1),
    ):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:²", "127.0.0.1:"])
def test_what_is_no_port_is_refused_as_such(address):
    with pytest.raises(ConfigError, match=f"no Ray cluster can be used: '{address.rpartition(':')[2]}' is not a port"):
        ray_engine._check_answers(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no.host.:1", "a..b:1", f"{'a' * 64}:1"])
def test_an_address_where_nobody_answers_is_refused_within_seconds(address):
    with pytest.raises(ConfigError, match="no Ray cluster can be used: .*check --ray-address"):
        ray_engine._check_answers(address)


def test_names_of_ray_s_own_are_left_to_ray(monkeypatch):
    asked = []
    monkeypatch.setattr(ray_engine.socket, "create_connection", lambda *address, **_: asked.append(address))
    ray_engine._check_answers("auto")
    assert asked == []


def test_a_task_that_is_run_again_counts_once():
    progress = Progress()
    for task, done, rejects in ((0, 100, 1), (1, 100, 0)):
        progress.start(task)
        progress.add(task, done, rejects)
    progress.start(0)
    progress.add(0, 60, 2)
    progress.add(2, 5, 0)  # of an actor that lost its memory with its node
    assert progress.totals() == (165, 2)


class _Pair(NamedTuple):
    path: Path
    number: int


@dataclass(frozen=True)
class _Job:
    paths: tuple[Path, ...]
    pair: _Pair
    name: str
    folder: Path | None = None


def test_every_path_of_a_task_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = _Job((Path("a"), Path("/b")), _Pair(Path("c"), 1), "d")
    assert absolute_paths((job, 5)) == (_Job((tmp_path / "a", Path("/b")), _Pair(tmp_path / "c", 1), "d"), 5)
    unchanged = _Job((Path("/b"),), _Pair(Path("/c"), 1), "d")
    assert absolute_paths(unchanged) == unchanged


def square_reporting(value: int, report) -> int:
    report(value, 1)
    return value * value


def square(value: int) -> int:
    return value * value


def refuse(value: int) -> int:
    raise DataError(f"value {value} is wrong", where="here", fix="another")


def kill_itself(value: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return value


def kill_itself_once(mark: Path, report) -> str:
    report(7, 0)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.name


@pytest.fixture(scope="module")
def engine():
    if importlib.util.find_spec("ray") is None:
        pytest.fail("the slow tests need the extra ray: EXTRAS=dev,hf,ray bash tests/run.sh -m slow")
    with pytest.MonkeyPatch.context() as patched:
        # The tasks of this file must be found by the workers; megatron_vlm is installed where they are.
        patched.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        with ray_cluster(None, num_workers=2) as run:
            yield run


@pytest.mark.slow
def test_results_come_in_the_order_of_the_tasks(engine):
    tasks = [(value,) for value in range(10)]
    assert engine(square, tasks, unit="values") == [value * value for value in range(10)]
    assert engine(square_reporting, tasks, unit="values", reports=True) == [value * value for value in range(10)]
    assert engine(square, [], unit="values") == []


@pytest.mark.slow
def test_what_is_done_and_rejected_is_shown(engine, monkeypatch):
    bars = []

    class Bar(ray_engine.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115
            bars.append(self)

    monkeypatch.setattr(ray_engine, "tqdm", Bar)
    engine(square_reporting, [(value,) for value in range(10)], unit="values", reports=True)
    assert (bars[0].n, bars[0].postfix) == (45, "rejects=10")
    engine(square, [(value,) for value in range(4)], unit="values")
    assert bars[1].n == 4


@pytest.mark.slow
def test_error_of_a_task_arrives_as_it_was_raised(engine):
    with pytest.raises(DataError, match="value 1 is wrong .here.; fix: another"):
        engine(refuse, [(1,), (1,)], unit="values")


@pytest.mark.slow
def test_a_task_whose_worker_dies_is_run_again_and_then_an_error_that_says_what_to_do(engine, tmp_path):
    assert engine(kill_itself_once, [(tmp_path / "mark",)], unit="values", reports=True) == ["mark"]
    with pytest.raises(StorageError, match="worker or node of the Ray cluster died.*fix: run the same command again"):
        engine(kill_itself, [(1,)], unit="values")


@pytest.mark.slow
def test_the_cluster_of_the_caller_is_used_and_left_running(engine):
    import ray

    with ray_cluster("127.0.0.1:1", num_workers=1) as other:
        assert other(square, [(3,)], unit="values") == [9]
    assert ray.is_initialized()


@pytest.mark.slow
def test_nodes_without_the_package_are_named_as_such(engine, monkeypatch):
    elsewhere = types.ModuleType("installed_on_one_node_only")
    exec("def square(value): return value * value", elsewhere.__dict__)
    monkeypatch.setitem(sys.modules, elsewhere.__name__, elsewhere)
    with pytest.raises(ConfigError, match="No module named 'installed_on_one_node_only'.*fix: install this version"):
        engine(elsewhere.square, [(3,)], unit="values")


@pytest.mark.slow
def test_ray_writes_the_bytes_of_one_worker(mmc4, tokenizer_path, tmp_path):
    command = [sys.executable, "-m", "megatron_vlm", "prepare", "interleaved", "--input", "mmc4", "--images"]
    command += ["mmc4/images", "--tokenizer", str(tokenizer_path), "--output"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(Path(ray_engine.__file__).parents[3])
    for output, way in (("one", ["--workers", "1"]), ("ray", ["--workers", "2", "--distributor", "ray"])):
        done = subprocess.run(
            [*command, output, *way], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert content(tmp_path / "ray") == content(tmp_path / "one")


@pytest.mark.usefixtures("_no_ray")
def test_without_ray_the_command_ends_with_a_line(mmc4, tokenizer_path, tmp_path, capsys):
    command = ["prepare", "interleaved", "--input", str(mmc4), "--images", str(mmc4 / "images")]
    command += ["--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "x"), "--distributor", "ray"]
    assert main(command) == 78
    assert "pip install 'megatron_vlm[ray]'" in capsys.readouterr().err
