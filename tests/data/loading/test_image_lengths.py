"""Shards, plan, loader and batch agree on images whose tokens depend on their size."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config import BlendEntry, LanguageConfig
from megatron_vlm.data.loading.collate import Collation, cut_sample
from megatron_vlm.data.loading.loader import BatchLoader
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.plan import build_plan
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment, TokenizerFacts
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.parallel.slicing import RankSlice
from tests.support.batches import validate
from tests.support.lengths import make_settings

LANGUAGE = LanguageConfig(vocab_size=100, num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
TOKENIZER = TokenizerFacts(name="tiny", sha256="0" * 64, vocab_size=100, bos_id=1, eos_id=2)
SEQ_LENGTH = 48


def patches(width: int, height: int) -> int:
    return -(-width // 4) * -(-height // 4)


IMAGE_TOKENS = ImageTokens(function=patches, identity="patches of 4x4")


def make_sample(rng: np.random.Generator, number: int) -> EncodedSample:
    segments: list[TextSegment | ImageSegment] = [TextSegment(np.array([1], dtype=np.int32), True)]
    for _ in range(rng.integers(0, 4)):
        width, height = rng.integers(4, 25, 2).tolist()
        stream = io.BytesIO()
        Image.new("RGB", (width, height), (number, 0, 0)).save(stream, "PNG")
        segments.append(ImageSegment(stream.getvalue(), (width, height)))
        segments.append(TextSegment(rng.integers(3, 100, rng.integers(1, 9)).astype(np.int32), True))
    return EncodedSample(tuple(segments))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    rng = np.random.default_rng(0)
    for name, number in (("a", 70), ("b", 30)):
        samples = [make_sample(rng, index) for index in range(number)]
        folder = tmp_path_factory.getbasetemp() / name
        write_dataset(folder, samples, dataset_name=name, tokenizer=TOKENIZER, samples_per_shard=16)
    return [ShardedDataset.open(tmp_path_factory.getbasetemp() / name) for name in "ab"]


def load(datasets, plan, rank: int = 0, size: int = 1):
    collation = Collation(
        seq_length=SEQ_LENGTH,
        image_tokens=IMAGE_TOKENS,
        vocab_size=100,
        image_token_id=LANGUAGE.image_token_id,
        pad_token_id=LANGUAGE.pad_token_id,
        image_size=8,
        image_aspect="pad",
        image_mean=(0.5, 0.5, 0.5),
    )
    rank_slice = RankSlice(data_parallel_rank=rank, data_parallel_size=size, micro_batch_size=2)
    return BatchLoader(datasets, plan, collation=collation, rank_slice=rank_slice)


def ids_of(sample: EncodedSample) -> list[int]:
    """Return the tokens of a sample with the placeholders of every image."""
    ids: list[int] = []
    for one in sample.segments:
        is_image = isinstance(one, ImageSegment)
        ids += [LANGUAGE.image_token_id] * patches(*one.size) if is_image else one.input_ids.tolist()
    return ids


@pytest.mark.parametrize("overflow", ["truncate", "split", "drop"])
def test_every_sample_has_the_placeholders_of_its_images(datasets, tmp_path, overflow):
    blend = (BlendEntry(path="a"), BlendEntry(path="b"))
    settings = make_settings(blend=blend, seq_length=SEQ_LENGTH, overflow=overflow, image_tokens=IMAGE_TOKENS)
    plan = build_plan(settings, datasets, tmp_path)
    found: dict[int, dict[int, list[int]]] = {}
    counts = []
    for batch in itertools.chain(*(load(datasets, plan, rank, size=2) for rank in range(2))):
        validate(batch, LANGUAGE, 0, RankSlice().image_share)
        counts += batch.image_lengths
        borders = batch.cu_seqlens.tolist()
        segments = [batch.input_ids[0, a:b].tolist() for a, b in itertools.pairwise(borders)]
        segments = [segment for segment in segments if segment[0] != LANGUAGE.pad_token_id]
        for sample_id, segment in zip(batch.sample_ids.tolist(), segments, strict=True):
            sample, first, _ = (sample_id, 0, None) if plan.fragments is None else plan.fragments.find(sample_id)
            found.setdefault(sample, {})[first] = segment
    samples = [dataset[index] for dataset in datasets for index in range(len(dataset))]
    expected = {number: ids_of(sample) for number, sample in enumerate(samples)}
    if overflow == "drop":
        expected = {number: ids for number, ids in expected.items() if len(ids) <= SEQ_LENGTH}
    if overflow == "truncate":
        expected = {number: ids_of(cut_sample(samples[number], SEQ_LENGTH, IMAGE_TOKENS)) for number in expected}
    parts = [(number, first, ids) for number, own in found.items() for first, ids in own.items()]
    assert all(ids == expected[number][first : first + len(ids)] for number, first, ids in parts)
    num_tokens = sum(len(ids) for *_, ids in parts)
    # Some fragments have no labels, and so no place in a row.
    assert overflow == "split" or num_tokens == sum(map(len, expected.values()))
    assert len(parts) + plan.nothing_to_train == (len(expected) if plan.fragments is None else plan.num_ids)
    assert (plan.summary.num_images, plan.summary.num_tokens) == (len(counts), num_tokens)
    assert len(set(counts)) > 10
    changed = {"truncate": plan.summary.truncated, "split": plan.summary.split, "drop": plan.summary.dropped}
    assert changed[overflow] > 10
