"""The writer takes samples that hold something."""

import numpy as np
import pytest

from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.shards.writer import ShardWriter, write_dataset


def test_empty_samples_segments_and_datasets_are_refused(tmp_path, tokenizer_facts):
    writer = ShardWriter(tmp_path / "00000")
    with pytest.raises(ValueError, match="at least one segment"):
        writer.add(EncodedSample(()))
    with pytest.raises(ValueError, match="must not be empty"):
        writer.add(EncodedSample((TextSegment(np.zeros(0, dtype=np.int32), True),)))
    writer.close()
    with pytest.raises(ValueError, match="at least one sample"):
        write_dataset(tmp_path, [], dataset_name="tiny", tokenizer=tokenizer_facts)


@pytest.mark.parametrize("size", [None, (0, 8), (8, 65536)])
def test_image_whose_size_does_not_fit_is_refused(tmp_path, size):
    writer = ShardWriter(tmp_path / "00000")
    with pytest.raises(ValueError, match="an image needs its width and height, each 1 to 65535 pixels"):
        writer.add(EncodedSample((ImageSegment(b"x", size),)))
    writer.close()


def test_sizes_of_the_images_are_two_numbers_of_16_bits_each(tmp_path):
    writer = ShardWriter(tmp_path / "00000")
    text = TextSegment(np.array([1], dtype=np.int32), True)
    writer.add(EncodedSample((ImageSegment(b"x", (640, 480)), text, ImageSegment(b"y", (65535, 1)))))
    writer.add(EncodedSample((text,)))
    facts = writer.close()
    assert (tmp_path / "00000.dim").read_bytes() == bytes.fromhex("8002 e001 ffff 0100")
    assert facts.files["dim"].bytes == 8
