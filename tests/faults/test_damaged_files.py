"""Every file of a checkpoint and of a dataset, damaged in every way: always found, and the message names the file.

A part runs always; `-m faults` runs all.
"""

import dataclasses
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.manifest import MANIFEST_NAME
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.checkpoint.verify import inspect_checkpoint
from megatron_vlm.config import CheckpointConfig, DataError
from megatron_vlm.data.shards.manifest import REJECTS_FILE, facts_of_file, load_manifest, save_manifest
from megatron_vlm.data.shards.verify import verify_dataset
from megatron_vlm.data.shards.writer import write_dataset
from tests.support.configs import tiny_run
from tests.support.jobs import start
from tests.support.runs import TOKENIZER
from tests.support.samples import make_samples

CHECKPOINT_FILES = (
    ".metadata",
    "__0_0.distcp",
    "__0_1.distcp",
    "common.pt",
    "config.yaml",
    "manifest.json",
    "metadata.json",
)
SHARD_FILES = (
    *(f"0000{number}.{suffix}" for number in (0, 1) for suffix in ("bin", "idx", "crc", "dim")),
    "manifest.json",
    "rejects.jsonl",
)
HOLE = 4096
"""A block of a file system [bytes]."""


def damages(content: bytes, others: list[bytes], seed: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield what can become of a file, and its content then; None: it is gone."""
    rng = random.Random(seed)
    for place in (0.0, *(rng.random() for _ in range(9)), 1.0):
        flipped = bytearray(content)
        position = min(int(len(content) * place), len(content) - 1)
        flipped[position] ^= 1 << rng.randrange(8)
        yield f"bit flipped in byte {position}", bytes(flipped)
    for begin in {0, max(0, len(content) // 2 - HOLE // 2), max(0, len(content) - HOLE)}:
        end = min(begin + HOLE, len(content))
        yield f"bytes {begin} to {end} are zeros", content[:begin] + bytes(end - begin) + content[end:]
    for size in {0, 1, len(content) // 2, len(content) - 1}:
        yield f"cut to {size} bytes", content[:size]
    yield "longer by a byte", content + b"\0"
    yield "gone", None
    for number, other in enumerate(others):
        yield f"swapped with file {number}", other


def faults_of_checkpoint(folder: Path) -> list[str]:
    return list(inspect_checkpoint(folder, read_files=True).faults)


def faults_of_dataset(folder: Path) -> list[str]:
    try:
        return list(verify_dataset(folder))
    except DataError as error:
        return [str(error)]


def is_same(name: str, damaged: bytes | None, content: bytes) -> bool:
    """Whether nothing is lost: the line break at the end of a manifest counts for nothing."""
    return damaged is not None and (
        damaged == content or (name == MANIFEST_NAME and damaged.rstrip(b"\n") == content.rstrip(b"\n"))
    )


def check_all(folder: Path, other: Path, name: str, find: Callable[[Path], list[str]], share: int = 1) -> int:
    """Damage the file `name` in every way, or in each `share`-th, and return the number of cases."""
    path, content = folder / name, (folder / name).read_bytes()
    # The same file of another checkpoint or dataset, and the neighbours of this one.
    neighbours = sorted(one for one in folder.iterdir() if one.is_file() and one.name != name)
    others = [(other / name).read_bytes(), *(one.read_bytes() for one in neighbours)]
    cases = [case for case in damages(content, others, seed=sum(name.encode())) if not is_same(name, case[1], content)]
    assert not find(folder)
    for what, damaged in cases[::share]:
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        found = find(folder)
        # The whole manifest of another dataset contradicts every file, and the lines say that it does.
        named = "manifest" if name == MANIFEST_NAME and what.startswith("swapped") else name
        assert any(named in fault for fault in found), f"{name}, {what}: {found}"
        path.write_bytes(content)
    return len(cases)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of a run."""
    from megatron_vlm.parallel.groups import single_process

    with single_process():
        run_dir = str(tmp_path_factory.mktemp("run"))
        state = start(dataclasses.replace(tiny_run(run_dir), checkpoint=CheckpointConfig(keep_last=0)))
        paths = []
        for state.iteration in (1, 2):
            paths.append(save_checkpoint(state.config, state.chunks, state.optimizer, state.progress()))
            state.optimizer.param_groups[0]["params"][0].data.add_(1.0)
    return paths


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Two datasets of two shards and a list of rejects."""
    samples, paths = [placed.sample for placed in make_samples(36)], []
    for number in (0, 1):
        folder = tmp_path_factory.mktemp("dataset") / "shards"
        part = samples[12 * number : 12 * number + 12 + number]
        write_dataset(folder, part, dataset_name="tiny", tokenizer=TOKENIZER, samples_per_shard=7)
        (folder / REJECTS_FILE).write_text('{"reason": "json_type"}\n' * (number + 1))
        manifest = load_manifest(folder)
        rejects = {"rejects": {"json_type": number + 1}, "rejects_file": facts_of_file(folder / REJECTS_FILE)}
        documents = manifest.documents + number + 1
        save_manifest(dataclasses.replace(manifest, documents=documents, **rejects), folder)
        paths.append(folder)
    return paths


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A copy that a test may damage, and another checkpoint."""
    return shutil.copytree(checkpoints[0], tmp_path / checkpoints[0].name), checkpoints[1]


@pytest.fixture
def dataset(datasets, tmp_path):
    return shutil.copytree(datasets[0], tmp_path / "shards"), datasets[1]


def test_these_are_all_files(checkpoints, datasets):
    assert sorted(os.listdir(checkpoints[0])) == sorted(CHECKPOINT_FILES)
    assert sorted(os.listdir(datasets[0])) == sorted(SHARD_FILES)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_some_damage_of_each_file_of_a_checkpoint_is_found(checkpoint, name):
    check_all(*checkpoint, name, faults_of_checkpoint, share=4)


@pytest.mark.parametrize("name", SHARD_FILES)
def test_some_damage_of_each_file_of_a_dataset_is_found(dataset, name):
    check_all(*dataset, name, faults_of_dataset, share=4)


@pytest.mark.faults
def test_all_damage_is_found(checkpoint, dataset):
    number = sum(check_all(*checkpoint, name, faults_of_checkpoint) for name in CHECKPOINT_FILES)
    number += sum(check_all(*dataset, name, faults_of_dataset) for name in SHARD_FILES)
    assert number >= 400
