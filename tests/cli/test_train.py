import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_vlm.checkpoint.manifest import FileRecord, Manifest, write_manifest
from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.data.shards.writer import write_dataset
from tests.support.samples import make_samples
from tests.support.training_jobs import (
    LONG,
    errors_of,
    exit_status,
    ranks_of,
    started_jobs,
    two_node_step,
    wait_for_iteration,
)

PIPELINE = "parallel.pipeline_model_parallel_size=2"
TWO_BY_TWO = ("parallel.tensor_model_parallel_size=2", PIPELINE)


@pytest.fixture
def start(project):
    """Start `megatron-vlm train` and return the process; it is ended after the test."""
    with started_jobs(project) as start_process:
        yield start_process


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.yaml"], 78, "config file does not exist (nowhere.yaml)"),
        (["train.yaml", "optimizer.lr_warmup_iter=3"], 78, "did you mean optimizer.lr_warmup_iters"),
        (["train.yaml", "optimizer.lr=fast"], 78, "optimizer.lr='fast' is not a number"),
        (["train.yaml", *TWO_BY_TWO, "--nproc-per-node", "3"], 78, "3 ranks are not a multiple of"),
        (["train.yaml", "training.global_batch_size=3", "--nproc-per-node", "2"], 78, "; fix: choose 4"),
        (["train.yaml", "data.blend=[{path: nowhere}]"], 65, "nowhere"),
        (["train.yaml", "data.tokenizer=nowhere.model"], 78, "tokenizer cannot be read"),
        (["train.yaml", "data.quarantine=nowhere.txt"], 78, "data.quarantine cannot be read: No such file"),
        (["train.yaml", "checkpoint.load_weights=nowhere"], 65, "no complete checkpoint found (nowhere)"),
        (["train.yaml", "checkpoint.load_weights=shards"], 65, "folder is a dataset, not a checkpoint (shards)"),
        (["train.yaml", "model.language.vocab_size=500"], 78, "model.language.vocab_size is 500"),
        (["train.yaml", "training.fp8=hybrid"], 78, "training.fp8=hybrid needs"),
        (["train.yaml", "run_dir=train.yaml"], 78, "run_dir is a file"),
        (["train.yaml", "--nproc-per-node", "0"], 64, "argument --nproc-per-node: 0 is below 1"),
    ],
)
def test_wrong_input_is_one_line_before_any_rank_starts(project, arguments, code, message):
    started = time.monotonic()
    done = project.run("train", *arguments)
    assert time.monotonic() - started < 15
    (line,) = done.stderr.splitlines()
    assert done.returncode == code
    assert line.startswith("megatron-vlm: error: ")
    assert message in line
    assert len(line) <= 300


def test_data_of_another_tokenizer_is_refused(project):
    other = TokenizerFacts(name="other", sha256="0" * 64, vocab_size=400, bos_id=1, eos_id=2)
    write_dataset(project.folder / "foreign", [make_samples(1)[0].sample], dataset_name="foreign", tokenizer=other)
    done = project.run("train", "train.yaml", "data.blend=[{path: foreign}]")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 65
    assert "tokenizer" in line


def test_checks_need_no_torch(project):
    (project.folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
    try:
        done = project.run("train", "train.yaml", "--nproc-per-node", "3", *TWO_BY_TWO)
    finally:
        (project.folder / "torch.py").unlink()
    assert done.returncode == 78


def test_error_before_the_start_is_written_for_job_scripts(project):
    done = project.run("train", "train.yaml", "run_dir=early", "data.blend=[{path: nowhere}]")
    status = exit_status(project, "early")
    assert (status["exit_code"], status["iteration"]) == (65, None)
    assert status["message"] in done.stderr
    assert [path.name for path in (project.folder / "early").iterdir()] == ["exit_status.json"]


def test_several_launchers_on_a_node_are_refused(project):
    variables = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"}
    done = project.run("train", "train.yaml", **variables)
    assert (done.returncode, "--ntasks-per-node=1" in done.stderr) == (78, True)


@pytest.mark.distributed
def test_error_of_every_rank_is_told_once_and_has_its_exit_code(project):
    (project.folder / "spoiled").mkdir()
    lost = {"lost": FileRecord(size=1, crc32=0)}
    write_manifest(project.folder / "spoiled", Manifest(iteration=0, progress={}, files=lost))
    done = project.run(
        "train", "train.yaml", "run_dir=once", "checkpoint.load_weights=spoiled", "--nproc-per-node", "2"
    )
    assert done.returncode == 65
    assert len(errors_of(done.stderr)) == 1
    assert "Traceback" not in done.stderr
    assert exit_status(project, "once")["exit_code"] == 65


def path_with(folder: Path, patch: str) -> str:
    """Return a PYTHONPATH on which every process of a job runs `patch` first."""
    (folder / "sitecustomize.py").write_text(patch)
    return f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


CRASH = """
from megatron_vlm.platform.files.metrics import PastRecords


def crash(self):
    raise IndexError("made by the test")


PastRecords.drop_lost = crash
"""


@pytest.mark.distributed
def test_crash_shows_one_traceback_and_names_the_rank(project, tmp_path):
    path = path_with(tmp_path, CRASH)
    done = project.run("train", "train.yaml", "run_dir=crash", PIPELINE, "--nproc-per-node", "2", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "rank 1 crashed: IndexError: made by the test" in errors_of(done.stderr)[0]


@pytest.mark.distributed
def test_folder_in_place_of_a_file_of_the_run_is_one_line(project):
    (project.folder / "in_the_way" / "tokenizer.model").mkdir(parents=True)
    done = project.run("train", "train.yaml", "run_dir=in_the_way", PIPELINE, "--nproc-per-node", "2")
    assert done.returncode == 74
    (line,) = errors_of(done.stderr)
    assert "Is a directory (in_the_way/tokenizer.model); fix: move away what stands there" in line
    assert "Traceback" not in done.stderr


def test_file_in_place_of_a_folder_of_the_run_is_refused_before_any_rank_starts(project):
    (project.folder / "file_in_the_way").mkdir()
    (project.folder / "file_in_the_way" / "checkpoints").touch()
    done = project.run("train", "train.yaml", "run_dir=file_in_the_way")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 74
    assert "Not a directory (file_in_the_way/checkpoints); fix: move away what stands there" in line


SWAPPED_ROWS = """
import os

if os.environ.get("RANK") == "1":
    from megatron_vlm.data.loading import loader

    planned = loader._MicroBatches._rows

    def swapped(self, position):
        iteration, index = divmod(position, self.num_micro_batches)
        return planned(self, position if iteration != 2 else 2 * self.num_micro_batches + 1 - index)

    loader._MicroBatches._rows = swapped
"""


@pytest.mark.distributed
def test_run_whose_loader_swaps_two_rows_on_one_rank_ends_before_the_step_is_saved(project, tmp_path):
    path = path_with(tmp_path, SWAPPED_ROWS)
    arguments = ("run_dir=swapped", "checkpoint.save_interval=1", "--nproc-per-node", "2")
    done = project.run("train", "train.yaml", *arguments, PYTHONPATH=path)
    assert done.returncode == 70
    (line,) = errors_of(done.stderr)
    assert "the samples consumed at iteration 3 with hash " in line
    assert "Traceback" not in done.stderr
    assert exit_status(project, "swapped")["exit_code"] == 70
    checkpoints = sorted(path.name for path in (project.folder / "swapped" / "checkpoints").glob("iter_*"))
    assert checkpoints == ["iter_0000001", "iter_0000002"]
    assert len((project.folder / "swapped" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.distributed
def test_killed_rank_ends_the_job_within_five_seconds_and_is_named(project, start):
    process = start("killed", *LONG, "--nproc-per-node", "2")
    wait_for_iteration(project, "killed", 2)
    ranks = ranks_of(process)
    ranks[1].kill()
    killed = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - killed < 5
    assert process.returncode == 1
    (line,) = errors_of(errors)
    assert f"rank 1 (process {ranks[1].pid}) was killed by SIGKILL" in line
    assert "Traceback" not in errors
    assert exit_status(project, "killed")["message"] in line


@pytest.mark.distributed
def test_stopped_run_loses_no_step_and_asks_to_be_requeued(project, start):
    process = start("stopped", *LONG, "checkpoint.save_interval=100000", "--nproc-per-node", "2")
    wait_for_iteration(project, "stopped", 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    status, lines = exit_status(project, "stopped"), (project.folder / "stopped" / "metrics.jsonl").read_text()
    done = json.loads(lines.splitlines()[-1])["iteration"]
    assert (status["exit_code"], status["iteration"]) == (75, done)
    assert (project.folder / "stopped" / "checkpoints" / f"iter_{done:07d}" / "manifest.json").exists()


@pytest.mark.distributed
def test_run_that_is_stopped_during_a_validation_saves_and_asks_to_be_requeued(project, start):
    validation = (
        "data.validation=[{path: shards}]",
        "training.validation_interval=2",
        "training.validation_iters=9999",
    )
    process = start("validating", *LONG, *validation, "checkpoint.save_interval=100000", "--nproc-per-node", "2")
    wait_for_iteration(project, "validating", 1)
    time.sleep(3)  # the second iteration is done, and its validation takes minutes
    everything = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    lines = [json.loads(line) for line in (project.folder / "validating" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert "validation_loss" not in lines[1]
    assert (project.folder / "validating" / "checkpoints" / "iter_0000002" / "manifest.json").exists()
    assert not psutil.wait_procs(everything, timeout=10)[1]


@pytest.mark.distributed
def test_nothing_is_left_of_a_job_whose_launcher_is_killed(project, start):
    process = start("launcher", *LONG, "checkpoint.save_interval=1", "--nproc-per-node", "2")
    wait_for_iteration(project, "launcher", 2)
    everything = psutil.Process(process.pid).children(recursive=True)
    # The two ranks, and at least megatron-core's checkpoint helper of each of them.
    assert len(everything) >= 4
    process.kill()
    process.wait(timeout=20)
    assert not psutil.wait_procs(everything, timeout=10)[1]


@pytest.mark.distributed
def test_second_job_on_the_folder_is_refused(project, start):
    start("taken", *LONG)
    wait_for_iteration(project, "taken", 1)
    done = project.run("train", "train.yaml", "run_dir=taken")
    assert done.returncode == 78
    (line,) = errors_of(done.stderr)
    assert "another job uses this run folder: host " in line
    assert ", attempt 1 (taken)" in line


@pytest.mark.distributed
def test_two_nodes_of_a_slurm_job_train_together_and_say_nothing_needless(project, start):
    step = two_node_step("localhost,other[1-3]")
    nodes = [start("nodes", "--nproc-per-node", "1", SLURM_NODEID=str(rank), **step) for rank in range(2)]
    errors = [node.communicate(timeout=90)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert json.loads((project.folder / "nodes" / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 4
    assert exit_status(project, "nodes")["exit_code"] == 0
    lines = [line for text in errors for line in text.splitlines()]
    assert not [line for line in lines if " | " not in line]
    assert not [line for line in lines if "warning" in line.lower()]


@pytest.mark.distributed
def test_training_goes_on_with_larger_images_from_the_weights_of_another_run(project):
    first = project.run("train", "train.yaml", "run_dir=small_images", "training.train_iters=2")
    assert first.returncode == 0, first.stderr
    # 36 patches in place of 16
    overrides = ("model.vision.image_size=48", "checkpoint.load_weights=small_images", "training.train_iters=2")
    done = project.run("train", "train.yaml", "run_dir=large_images", *overrides)
    assert done.returncode == 0, done.stderr
    assert "position_embeddings.weight is interpolated for another image size, from [17, 36] to [37, 36]" in done.stderr
    assert len((project.folder / "large_images" / "metrics.jsonl").read_text().splitlines()) == 2


READ_ONLY = """
import errno
import os
import sys


def refuse(event, arguments):
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
    if event == "open" and isinstance(arguments[2], int):
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and "replayed" in str(arguments[0]):
        raise OSError(errno.EROFS, "Read-only file system", str(arguments[0]))


sys.addaudithook(refuse)
"""


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return when each file and folder in a folder was changed, and what the files hold."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


def test_a_replay_logs_the_loss_of_each_sample_and_changes_nothing(project, tmp_path):
    trained = project.run("train", "train.yaml", "run_dir=replayed", "training.exit_iteration=2")
    assert trained.returncode == 0, trained.stderr
    (project.folder / "replayed" / "checkpoints" / "iter_0000001.megatron_vlm-unfinished").mkdir()  # of a killed save
    before = content(project.folder / "replayed")
    path = path_with(tmp_path, READ_ONLY)
    done = project.run("train", "train.yaml", "run_dir=replayed", "--replay", "2", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" labels, loss ") >= 4
    assert "iteration 2 replayed: loss " in done.stderr
    assert done.stderr.rstrip().endswith(", as recorded")
    done = project.run("train", "train.yaml", "run_dir=replayed", "--replay", "5", PYTHONPATH=path)
    assert done.returncode == 64
    assert "iteration 5 of 4 does not exist" in done.stderr.splitlines()[-1]
    assert content(project.folder / "replayed") == before
