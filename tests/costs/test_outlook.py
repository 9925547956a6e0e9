import dataclasses

import pytest

from megatron_vlm.config import BlendEntry
from megatron_vlm.costs.flops import Work, step_flops
from megatron_vlm.costs.outlook import foresee
from megatron_vlm.data.loading.collate import cut_sample
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.samples import ImageSegment, TokenizerFacts
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.writer import write_dataset
from tests.support.configs import VOCAB_SIZE, tiny_run
from tests.support.samples import make_samples, sample_length

NUM_SAMPLES = 24


@pytest.fixture
def dataset(tmp_path):
    facts = TokenizerFacts(name="tiny", sha256="0" * 64, vocab_size=VOCAB_SIZE, bos_id=1, eos_id=2)
    samples = [placed.sample for placed in make_samples(NUM_SAMPLES)]
    write_dataset(tmp_path / "shards", samples, dataset_name="tiny", tokenizer=facts)
    return ShardedDataset.open(tmp_path / "shards")


def one_epoch(freeze=(), **parallel):
    run = tiny_run(
        parallel=parallel,
        training={"train_iters": None, "train_epochs": 1, "global_batch_size": 1, "freeze": freeze},
    )
    return dataclasses.replace(run, data=dataclasses.replace(run.data, blend=(BlendEntry(path="shards"),)))


def test_one_epoch_counts_every_sample_once(dataset):
    samples = [placed.sample for placed in make_samples(NUM_SAMPLES)]
    outlook = foresee(one_epoch(), [dataset])
    assert outlook.packing.num_samples == NUM_SAMPLES
    assert outlook.packing.num_tokens == sum(sample_length(sample, 16) for sample in samples)
    assert outlook.work.num_labels == sum(
        len(segment.input_ids)
        for sample in samples
        for segment in sample.segments
        if not isinstance(segment, ImageSegment) and segment.train
    )


def short_rows(overflow):
    run = one_epoch()
    return dataclasses.replace(run, data=dataclasses.replace(run.data, seq_length=32, overflow=overflow))


def test_fragments_of_split_samples_are_counted_once(dataset):
    whole, split = foresee(one_epoch(), [dataset]), foresee(short_rows("split"), [dataset])
    assert split.packing.split > 3
    assert sum(split.packing.nothing_to_train) > 0  # the fragments that have no label
    assert split.packing.num_tokens < whole.packing.num_tokens
    # Labels are estimated: a part of the text, the same in both.
    text = [one.packing.num_tokens - 16 * one.packing.num_images for one in (whole, split)]
    assert split.work.num_labels == pytest.approx(whole.work.num_labels * text[1] / text[0], abs=1)
    assert split.flops < whole.flops  # nothing looks across a cut


def is_trained(sample):
    """Whether a token behind the first one is trained on."""
    flags = []
    for segment in sample.segments:
        flags += [False] if isinstance(segment, ImageSegment) else [segment.train] * len(segment.input_ids)
    return any(flags[1:])


def test_cut_samples_are_counted_as_long_as_they_are_in_their_rows(dataset):
    whole = [placed.sample for placed in make_samples(NUM_SAMPLES)]
    samples = [cut_sample(sample, 32, ImageTokens(16)) for sample in whole]
    # What a cut leaves without a label is in no row.
    left = [sample_length(sample, 16) > 32 and not is_trained(cut) for sample, cut in zip(whole, samples, strict=True)]
    lengths = [sample_length(sample, 16) for sample, is_out in zip(samples, left, strict=True) if not is_out]
    assert any(16 < length < 32 for length in lengths)
    run = short_rows("truncate")
    outlook = foresee(run, [dataset])
    assert outlook.packing.num_tokens == sum(lengths)
    work = Work(
        num_tokens=sum(lengths),
        attention_pairs=sum(length * (length + 1) // 2 for length in lengths),
        num_labels=outlook.work.num_labels,
        num_images=outlook.packing.num_images,
    )
    assert outlook.flops == pytest.approx(step_flops(run.model, (), work).total)


def test_balance_is_reported_for_the_ranks_asked_for(dataset):
    run = one_epoch()
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=4))
    assert foresee(run, [dataset]).balance == ()
    assert [balance.data_parallel_size for balance in foresee(run, [dataset], [2, 4]).balance] == [2, 2, 4, 4]


def test_clustered_rows_have_several_lengths(dataset):
    run = one_epoch()
    data = dataclasses.replace(run.data, packing=False, length_clustering=True, length_multiple=8)
    shortest, longest = foresee(dataclasses.replace(run, data=data), [dataset]).row_lengths
    assert shortest < longest <= run.data.seq_length


def test_operations_grow_with_the_epochs(dataset):
    run = one_epoch()
    twice = dataclasses.replace(run, training=dataclasses.replace(run.training, train_epochs=2))
    assert foresee(twice, [dataset]).flops == pytest.approx(2 * foresee(run, [dataset]).flops)


def test_frozen_parts_cost_less(dataset):
    whole, tower_frozen = (foresee(one_epoch(freeze), [dataset]).flops for freeze in ((), ("vision_model",)))
    both_frozen = foresee(one_epoch(("vision_model", "language_model")), [dataset]).flops
    assert both_frozen < tower_frozen < whole


def test_stages_share_all_of_the_work_and_the_tower_weighs_on_the_first(dataset):
    outlook = foresee(one_epoch(pipeline_model_parallel_size=4), [dataset])
    assert sum(outlook.stage_fractions) == pytest.approx(1)
    assert outlook.stage_fractions[0] > outlook.stage_fractions[1]
    assert outlook.stage_fractions[-1] > outlook.stage_fractions[1]
