from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_vlm.checkpoint.stored_values import Piece, StoredTensor, read_stored
from megatron_vlm.config import CheckpointError

WHOLE = torch.arange(4 * 6 * 5.0).view(4, 6, 5)


@pytest.fixture
def stored(tmp_path):
    """A tensor in eight pieces of one file, as ranks write it that cut two of its axes."""
    pieces = []
    with (tmp_path / "file").open("wb") as stream:
        for layers, rows in product(((0, 1), (1, 2), (2, 3), (3, 4)), ((0, 4), (4, 6))):
            begin, part = stream.tell(), WHOLE[slice(*layers), slice(*rows)].clone()
            torch.save(part, stream)
            offsets = (layers[0], rows[0], 0)
            pieces.append(Piece(offsets, tuple(part.shape), tmp_path / "file", begin, stream.tell() - begin))
    return StoredTensor(tuple(WHOLE.shape), WHOLE.dtype, tuple(pieces))


def test_a_tensor_is_put_together_from_its_pieces(stored):
    assert torch.equal(read_stored(stored), WHOLE)
    for layer in range(4):
        assert torch.equal(read_stored(stored, layer), WHOLE[layer])


def test_values_that_are_a_view_of_others_keep_their_places(tmp_path):
    view = WHOLE[1:3].transpose(1, 2)
    torch.save(view, tmp_path / "file")
    piece = Piece((0, 0, 0), tuple(view.shape), tmp_path / "file", 0, (tmp_path / "file").stat().st_size)
    found = read_stored(StoredTensor(tuple(view.shape), view.dtype, (piece,)))
    assert torch.equal(found, view)
    found.zero_()  # in memory only
    assert torch.equal(torch.load(tmp_path / "file"), view)


def test_a_piece_that_is_missing_is_told(stored):
    torn = replace(stored, pieces=stored.pieces[:-1])
    assert torch.equal(read_stored(torn, 1), WHOLE[1])
    with pytest.raises(CheckpointError, match="a tensor is stored in part only"):
        read_stored(torn, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": torch.bfloat16}, r"ValueError: \[1, 4, 5\] torch.float32"), ({"pieces": ()}, "stored in part only")],
)
def test_values_that_are_not_those_of_the_index_are_told(stored, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_stored(replace(stored, **change))


def test_bytes_that_are_no_tensor_are_told(stored):
    first = stored.pieces[0]
    first.file.write_bytes(bytes(first.file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"values cannot be read: .*file\); fix: use another checkpoint"):
        read_stored(stored)
