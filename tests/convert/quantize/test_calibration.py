import pytest
import torch

from megatron_vlm.config import DataError
from megatron_vlm.convert.quantize.calibration import MAX_SEQUENCES, read_calibration
from megatron_vlm.data.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)


def test_every_sequence_begins_with_bos_and_goes_on_where_the_last_one_ended(tokenizer, calibration):
    ids = read_calibration(calibration, tokenizer)
    assert ids.shape[0] >= 4
    assert ids.shape[1] == 512
    assert (ids[:, 0] == tokenizer.bos_id).all()
    whole = torch.tensor(tokenizer.encode(calibration.read_text()))
    assert torch.equal(ids[:, 1:].flatten(), whole[: ids[:, 1:].numel()])


def test_a_long_text_is_cut(tokenizer, calibration, tmp_path):
    (tmp_path / "long.txt").write_text(calibration.read_text() * 20)
    assert len(read_calibration(tmp_path / "long.txt", tokenizer)) <= MAX_SEQUENCES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"calibration text cannot be read: No such file or directory \(.*text.txt\); fix: name a text file"),
        (b"\xff\xfe\x00", "calibration text cannot be read: it is no text in UTF-8"),
        (b"A short text.", "calibration text has [0-9]+ tokens, at least 2044 are needed .*; fix: name a longer one"),
    ],
)
def test_a_text_that_cannot_serve_is_refused(content, message, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_calibration(path, tokenizer)
