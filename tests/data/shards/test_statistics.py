import numpy as np
import pytest
from PIL import Image as PILImage

from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.manifest import Manifest, save_manifest
from megatron_vlm.data.shards.statistics import compute_statistics, format_statistics, save_histograms
from megatron_vlm.data.shards.writer import write_dataset


def text(count: int, train: bool = True) -> TextSegment:
    return TextSegment(np.arange(3, 3 + count, dtype=np.int32), train)


@pytest.fixture
def statistics(folder, tokenizer_facts):
    image = ImageSegment(b"xyz", (8, 8))
    samples = [
        EncodedSample((text(1), image, text(5, False), image, text(4))),
        EncodedSample((text(8), image)),
        EncodedSample((text(2),)),
    ]
    write_dataset(folder, samples, dataset_name="mmc4", tokenizer=tokenizer_facts)
    return compute_statistics(ShardedDataset.open(folder))


def test_means_are_those_of_table_2_of_the_paper(statistics):
    assert statistics.images_per_sample == 1.0
    assert statistics.text_tokens_per_image == pytest.approx(20 / 3)
    assert (statistics.samples, statistics.images, statistics.text_tokens, statistics.trained_tokens) == (3, 3, 20, 15)


def test_histograms_count_samples(statistics):
    assert statistics.images_histogram == {0: 1, 1: 1, 2: 1}
    assert statistics.text_tokens_histogram == {2: 1, 8: 2}


def test_every_number_is_in_the_text(statistics):
    lines = dict(line.split("  ", 1) for line in format_statistics(statistics).splitlines())
    found = {name: value.strip() for name, value in lines.items()}
    assert found["images per sample"] == "1.00"
    assert found["text tokens per image"] == "6.7"
    assert found["samples by text tokens from"] == "2: 1, 8: 2"


def test_dataset_without_images_has_no_tokens_per_image(folder, tokenizer_facts):
    write_dataset(folder, [EncodedSample((text(3),))], dataset_name="text", tokenizer=tokenizer_facts)
    statistics = compute_statistics(ShardedDataset.open(folder))
    assert statistics.text_tokens_per_image is None
    assert "text tokens per image        -" in format_statistics(statistics)


def test_a_part_without_a_sample_has_statistics_too(folder, tokenizer_facts, tmp_path):
    folder.mkdir()
    manifest = Manifest(
        dataset_name="text", tokenizer=tokenizer_facts, shards=(), documents=3, rejects={"empty_text": 3}
    )
    save_manifest(manifest, folder)
    statistics = compute_statistics(ShardedDataset.open(folder))
    assert (statistics.samples, statistics.images_per_sample, statistics.text_tokens_per_sample) == (0, None, None)
    assert "images per sample            -" in format_statistics(statistics)
    assert len(save_histograms(statistics, tmp_path / "plots")) == 2


def test_histograms_are_drawn_as_png_with_higher_bars_for_more_samples(statistics, tmp_path):
    paths = save_histograms(statistics, tmp_path / "plots")
    assert [path.name for path in paths] == ["images_per_sample.png", "text_tokens_per_sample.png"]
    with PILImage.open(paths[1]) as image:
        blue = (np.asarray(image.convert("RGB")) == (52, 101, 164)).all(-1)
    columns = blue.sum(0)
    bars = columns[columns > 0]
    assert bars.max() == pytest.approx(2 * bars.min(), rel=0.1)
