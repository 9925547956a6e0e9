from pathlib import PurePosixPath

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.config import CheckpointError
from megatron_vlm.convert.quantize.pickle_writer import PickleWriter
from megatron_vlm.convert.weights_writer import Announced

FILE = PurePosixPath("llm/llm-w4-g64-awq-v2.pt")
TENSORS = {
    "llm/model.norm.weight": torch.arange(12.0).half().view(3, 4).T,
    "tower/weight": torch.arange(6.0),
    "llm/a.qweight": torch.arange(8, dtype=torch.int16)[:4],
}


@pytest.fixture
def write(tmp_path):
    """Return a writer that has written tensors: write(tensors)."""

    def run(tensors) -> PickleWriter:
        announced = [Announced(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]
        writer = PickleWriter(tmp_path, FILE, announced, 10**9)
        writer.write(tensors.items())
        return writer

    return run


def test_one_folder_goes_into_a_pickle_and_the_others_into_safetensors(write, tmp_path):
    write(TENSORS).verify()
    pickled = torch.load(tmp_path / FILE, weights_only=True)
    assert set(pickled) == {"model.norm.weight", "a.qweight"}
    assert all(torch.equal(tensor, TENSORS[f"llm/{name}"]) for name, tensor in pickled.items())
    assert torch.equal(load_file(tmp_path / "tower" / "model.safetensors")["weight"], TENSORS["tower/weight"])
    assert sorted(path.name for path in (tmp_path / "llm").iterdir()) == [FILE.name]


def test_the_same_tensors_have_the_same_bytes(write, tmp_path):
    write(TENSORS)
    first = (tmp_path / FILE).read_bytes()
    write(TENSORS)
    assert (tmp_path / FILE).read_bytes() == first


def test_a_pickle_that_reads_back_differently_is_refused(write, tmp_path):
    writer = write(TENSORS)
    torch.save(torch.load(tmp_path / FILE) | {"a.qweight": torch.zeros(4, dtype=torch.int16)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"other values than were written \(.*awq-v2.pt\); fix: check the disk"):
        writer.verify()


def test_a_tensor_that_was_announced_and_is_missing_is_an_error(write):
    for name in TENSORS:
        with pytest.raises(CheckpointError, match="1 tensors were not written, first "):
            write({key: tensor for key, tensor in TENSORS.items() if key != name})
