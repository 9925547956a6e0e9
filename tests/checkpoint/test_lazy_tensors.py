import weakref

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_vlm.checkpoint.lazy_tensors import LazyTensor, save_lazily
from megatron_vlm.checkpoint.manifest import FileRecord, Manifest, checksum_file, write_manifest
from megatron_vlm.checkpoint.pickles import check_metadata
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor
from megatron_vlm.config import CheckpointError
from megatron_vlm.parallel.groups import single_process

TENSORS = {
    "model.embedding": torch.randn(40, 8),
    "model.layers.fc1": torch.randn(3, 16, 8).bfloat16(),
    "model.layers.norm": torch.randn(3, 8),
    "model.scalar": torch.tensor(3.0),
    "model.bias": torch.randn(8),
}


def lazy(key: str, tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        is_stacked="layers" in key,
        make=lambda layer: tensor if layer is None else tensor[layer],
    )


def write(folder, tensors, **options):
    folder.mkdir()
    with single_process():
        save_lazily(tensors, folder, **options)


def as_megatron_takes_them(key: str, tensor: torch.Tensor) -> dict[str, ShardedTensor]:
    if "layers" not in key:
        return {"whole": ShardedTensor.from_rank_offsets(key, tensor)}
    layers = (tensor[layer : layer + 1].clone() for layer in range(len(tensor)))
    return {
        f"{layer}": ShardedTensor.from_rank_offsets(key, values, (0, layer, len(tensor)))
        for layer, values in enumerate(layers)
    }


def test_files_are_those_that_megatron_core_writes(tmp_path):
    write(tmp_path / "ours", {key: lazy(key, tensor) for key, tensor in TENSORS.items()})
    (tmp_path / "theirs").mkdir()
    state = {key: as_megatron_takes_them(key, tensor) for key, tensor in TENSORS.items()}
    with single_process():
        dist_checkpointing.save(state, str(tmp_path / "theirs"))
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {path.name for path in (tmp_path / "ours").iterdir()}
    assert len(list((tmp_path / "ours").glob("*.distcp"))) == 2
    for name in names - {".metadata"}:  # the index holds a random number
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_tensors_are_read_back_whole_and_by_layer(tmp_path):
    write(tmp_path / "ours", {key: lazy(key, tensor) for key, tensor in TENSORS.items()})
    write_manifest(tmp_path / "ours", Manifest(iteration=0, progress={}, files={}))
    check_metadata(tmp_path / "ours")
    assert list_tensors(tmp_path / "ours") == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in sorted(TENSORS.items())
    }
    for key, tensor in TENSORS.items():
        assert torch.equal(read_tensor(tmp_path / "ours", key), tensor)
    assert torch.equal(read_tensor(tmp_path / "ours", "model.layers.fc1", 2), TENSORS["model.layers.fc1"][2])


def test_a_tensor_is_made_while_another_is_written_and_no_third_one_is_alive(tmp_path):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def make(layer):
        nonlocal most
        tensor = torch.zeros(32)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    tensors = {
        f"model.layers.{name}": LazyTensor(shape=(9, 32), dtype=torch.float32, is_stacked=True, make=make)
        for name in "abc"
    }
    reports = []
    write(tmp_path / "ours", tensors, report=lambda: reports.append(len(alive)))
    assert len(reports) == 27
    assert most <= 2


def test_a_view_is_written_without_the_rest_of_its_values(tmp_path):
    whole = torch.zeros(100_000)
    write(tmp_path / "ours", {"model.a": lazy("model.a", whole[:10])})
    assert sum(path.stat().st_size for path in (tmp_path / "ours").iterdir()) < 20_000


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(3), r"model.a is \[3\] torch.float32, announced as \[2\] torch.float32"),
        (torch.zeros(2).bfloat16(), r"model.a is \[2\] torch.bfloat16, announced as \[2\] torch.float32"),
    ],
)
def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path, made, message):
    wrong = LazyTensor(shape=(2,), dtype=torch.float32, is_stacked=False, make=lambda layer: made)
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "ours", {"model.a": wrong})


def test_a_file_that_reads_back_differently_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vlm.checkpoint.lazy_tensors.checksum_file", lambda path, **_: FileRecord(1, 2))
    with pytest.raises(CheckpointError, match=r"reads back with other bytes than were written \(.*__0_0.distcp\)"):
        write(tmp_path / "ours", {key: lazy(key, tensor) for key, tensor in TENSORS.items()})


def test_the_checksums_of_the_values_are_those_of_the_files(tmp_path):
    folder = tmp_path / "ours"
    folder.mkdir()
    with single_process():
        found = save_lazily({key: lazy(key, tensor) for key, tensor in TENSORS.items()}, folder)
    assert found == {path.name: checksum_file(path) for path in folder.glob("*.distcp")}
