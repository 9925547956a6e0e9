"""Global batches depend only on the plan, and a broken worker ends in one line."""

import dataclasses
import io
import itertools
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.config import BlendEntry, DataError, LanguageConfig
from megatron_vlm.data.loading.collate import Collation
from megatron_vlm.data.loading.loader import BatchLoader
from megatron_vlm.data.loading.workers import LoaderWorkers
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.plan import build_plan, open_plan
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment, TokenizerFacts
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.parallel.slicing import ImageShare, RankSlice
from tests.support.batches import validate

TOKENIZER = TokenizerFacts(name="tiny", sha256="0" * 64, vocab_size=100, bos_id=1, eos_id=2)
LANGUAGE = LanguageConfig(vocab_size=100, num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
NUM_IMAGE_TOKENS = 4
COLLATION = Collation(
    seq_length=64,
    image_tokens=ImageTokens(NUM_IMAGE_TOKENS),
    vocab_size=100,
    image_token_id=LANGUAGE.image_token_id,
    pad_token_id=LANGUAGE.pad_token_id,
    image_size=8,
    image_aspect="pad",
    image_mean=(0.5, 0.5, 0.5),
)
GLOBAL_BATCH_SIZE = 4


def encode_colour(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, colour, colour)).save(buffer, "PNG")
    return buffer.getvalue()


def make_samples(number: int, with_images: bool, seed: int) -> list[EncodedSample]:
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(number):
        segments = [TextSegment(np.array([1], dtype=np.int32), True)]
        for _ in range(rng.integers(0, 3) if with_images else 0):
            segments.append(ImageSegment(encode_colour(index % 256), (8, 8)))
            segments.append(TextSegment(rng.integers(3, 100, rng.integers(1, 9)).astype(np.int32), True))
        segments.append(TextSegment(rng.integers(3, 100, rng.integers(1, 20)).astype(np.int32), bool(index % 2)))
        samples.append(EncodedSample(tuple(segments)))
    return samples


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    for name, number, with_images in (("pictures", 90, True), ("text", 40, False)):
        samples = make_samples(number, with_images, seed=number)
        write_dataset(folder / name, samples, dataset_name=name, tokenizer=TOKENIZER, samples_per_shard=32)
    return [ShardedDataset.open(folder / name) for name in ("pictures", "text")]


def make_plan_settings(blend, **changes):
    settings = PlanSettings(
        blend=tuple(blend),
        seq_length=64,
        image_tokens=ImageTokens(NUM_IMAGE_TOKENS),
        packing=True,
        overflow="fail",
        seed=7,
        global_batch_size=GLOBAL_BATCH_SIZE,
        train_iters=None,
        train_epochs=1.5,
    )
    return dataclasses.replace(settings, **changes)


def make_plan(datasets, folder, **changes):
    blend = [BlendEntry(path=str(dataset.folder)) for dataset in datasets]
    return build_plan(make_plan_settings(blend, **changes), datasets, folder)


@pytest.fixture(scope="module")
def plan(datasets, tmp_path_factory):
    return make_plan(datasets, tmp_path_factory.mktemp("plans"))


def make_loader(datasets, plan, *, collation=COLLATION, start_iteration=0, **options):
    of_workers = {name: value for name, value in options.items() if name in ("num_workers", "prefetch_factor")}
    rank_slice = RankSlice(**{name: value for name, value in options.items() if name not in of_workers})
    return BatchLoader(
        datasets,
        plan,
        collation=collation,
        start_iteration=start_iteration,
        rank_slice=rank_slice,
        workers=LoaderWorkers(**of_workers),
    )


def ids_of_iterations(datasets, plan, dp=1, **options) -> list[list[int]]:
    """Sample ids of every global batch in the order of its rows, put together from the batches of all ranks."""
    result = []
    per_rank = []
    for rank in range(dp):
        loader = make_loader(datasets, plan, data_parallel_rank=rank, data_parallel_size=dp, **options)
        per_rank.append((loader.num_micro_batches, [_ids_of_rows(batch) for batch in loader]))
        loader.close()
    for iteration in range(plan.num_iterations):
        rows = []
        for number, batches in per_rank:
            rows.append(sum(batches[iteration * number : (iteration + 1) * number], []))
        result.append([ids for place in zip(*rows, strict=True) for ids in place])
    return result


def _ids_of_rows(batch) -> list[list[int]]:
    """Sample ids of each row of a micro-batch, from where its samples begin."""
    size = batch.input_ids.numel()
    starts = batch.cu_seqlens[:-1][batch.input_ids[0, batch.cu_seqlens[:-1].long()] != COLLATION.pad_token_id]
    rows = [[] for _ in range(size // 64)]
    for start, sample_id in zip(starts.tolist(), batch.sample_ids.tolist(), strict=True):
        rows[start // 64].append(sample_id)
    return rows


def equal_batches(first, second) -> bool:
    for field in dataclasses.fields(first):
        left, right = getattr(first, field.name), getattr(second, field.name)
        if not (torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right):
            return False
    return True


@pytest.mark.parametrize("overflow", ["fail", "split"])
@pytest.mark.parametrize("dp", [1, 3])
def test_a_blend_that_changes_reaches_any_number_of_ranks_as_planned(datasets, tmp_path, dp, overflow):
    pictures, text = (str(dataset.folder) for dataset in datasets)
    blend = (
        BlendEntry(path=pictures),
        BlendEntry(path=text, from_iteration=4),
        BlendEntry(path=pictures, from_iteration=6),
    )
    settings = make_plan_settings(
        blend,
        train_epochs=None,
        train_iters=8,
        global_batch_size=6,
        overflow=overflow,
        seq_length=64 if overflow == "fail" else 24,
    )
    plan = build_plan(settings, datasets, tmp_path)
    collation = dataclasses.replace(COLLATION, seq_length=settings.seq_length)
    per_rank = []
    for rank in range(dp):
        loader = make_loader(
            datasets, plan, collation=collation, data_parallel_rank=rank, data_parallel_size=dp, num_workers=1
        )
        per_rank.append([batch.sample_ids.tolist() for batch in loader])
        loader.close()
    for iteration in range(8):
        rows = 6 // dp
        found = sum((sum(batches[iteration * rows : (iteration + 1) * rows], []) for batches in per_rank), [])
        assert sorted(found) == sorted(plan.sample_ids(iteration).tolist())
    batches = list(make_loader(datasets, plan, collation=collation))
    assert {dataset for batch in batches for dataset in batch.label_datasets.tolist()} == {0, 1}


LENGTHS_OF_TRAINING = {
    "epochs": {"train_epochs": 2.5},
    "iterations": {"train_epochs": None, "train_iters": 40},  # 1.9 passes
}


@pytest.mark.parametrize("length", LENGTHS_OF_TRAINING)
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_global_batches_do_not_depend_on_ranks_workers_or_micro_batch(datasets, tmp_path, length, dp, workers, micro):
    plan = make_plan(datasets, tmp_path, global_batch_size=8, **LENGTHS_OF_TRAINING[length])
    expected = [[plan.row(8 * batch + row).tolist() for row in range(8)] for batch in range(plan.num_iterations)]
    found = ids_of_iterations(datasets, plan, dp, num_workers=workers, micro_batch_size=micro, prefetch_factor=2)
    assert found == expected


def test_every_sample_comes_once_per_epoch_across_the_ends_of_epochs(datasets, tmp_path):
    one_pass = make_plan(datasets, tmp_path, global_batch_size=8, train_epochs=1).summary.num_rows
    assert one_pass % 8, "the pass ends in the middle of a batch"
    plan = make_plan(datasets, tmp_path, global_batch_size=8, train_epochs=2.5)
    batches = [sum(rows, []) for rows in ids_of_iterations(datasets, plan)]
    number = sum(map(len, datasets))
    assert len(set(sum(batches[: one_pass // 8], []))) == len(sum(batches[: one_pass // 8], []))
    assert set(sum(batches[: one_pass // 8 + 1], [])) == set(range(number))
    counts = np.bincount(sum(batches, []), minlength=number)
    assert set(counts.tolist()) == {2, 3}
    assert (counts == 3).sum() == number // 2


def test_position_in_the_middle_is_found_at_once(tmp_path):
    class Many:
        """A dataset that has only lengths."""

        num_images = np.zeros(1_000_000, dtype=np.int32)
        text_lengths = np.random.default_rng(0).integers(1, 64, 1_000_000).astype(np.int32)
        fingerprint = "many"

        def __len__(self):
            return 1_000_000

    settings = make_plan_settings([BlendEntry(path="many")])
    plan = build_plan(settings, [Many()], tmp_path)
    started = time.perf_counter()
    plan = open_plan(settings, [Many()], tmp_path)
    ids = plan.sample_ids(plan.num_iterations // 2)
    assert time.perf_counter() - started < 1
    assert len(ids) >= GLOBAL_BATCH_SIZE


@pytest.mark.parametrize("workers", [0, 2])
def test_fragments_of_a_sample_are_the_sample(datasets, tmp_path, workers):
    plan = make_plan(datasets, tmp_path, overflow="split", seq_length=16, train_epochs=1)
    assert plan.summary.split > 20
    collation = dataclasses.replace(COLLATION, seq_length=16)
    found = {}
    for batch in make_loader(datasets, plan, collation=collation, num_workers=workers, micro_batch_size=2):
        validate(batch, LANGUAGE, NUM_IMAGE_TOKENS, ImageShare())
        borders = batch.cu_seqlens.tolist()
        segments = [batch.input_ids[0, a:b].tolist() for a, b in itertools.pairwise(borders)]
        segments = [segment for segment in segments if segment[0] != COLLATION.pad_token_id]
        found |= dict(zip(batch.sample_ids.tolist(), segments, strict=True))
    tokens = [_tokens_of(dataset[index]) for dataset in datasets for index in range(len(dataset))]
    covered = [0] * len(tokens)
    for sample_id in range(plan.num_ids):
        sample, first, last = plan.fragments.find(sample_id)
        ids, trained = zip(*tokens[sample][first:last], strict=True)
        covered[sample] += len(ids)
        assert found.get(sample_id, list(ids)) == list(ids)
        is_whole = (first, last) == (0, None)
        assert (sample_id in found) == (is_whole or any(trained[1:]))  # the first token of a fragment has no loss
    assert covered == list(map(len, tokens))


def _tokens_of(sample) -> list[tuple[int, bool]]:
    """Return the id of each token, and whether it is trained on."""
    tokens = []
    for segment in sample.segments:
        if isinstance(segment, ImageSegment):
            tokens += [(COLLATION.image_token_id, False)] * NUM_IMAGE_TOKENS
        else:
            tokens += [(token, segment.train) for token in segment.input_ids.tolist()]
    return tokens


def test_error_in_a_fragment_names_its_tokens(tmp_path):
    samples = make_samples(4, False, seed=1)
    long = TextSegment(np.full(40, 7, dtype=np.int32), True)
    samples.append(EncodedSample((long, ImageSegment(b"no image", (8, 8)))))
    write_dataset(tmp_path / "d", samples, dataset_name="d", tokenizer=TOKENIZER)
    datasets = [ShardedDataset.open(tmp_path / "d")]
    plan = make_plan(datasets, tmp_path, overflow="split", seq_length=32)
    with pytest.raises(DataError, match=r"not a JPEG.*d/00000\.bin sample 4 tokens 32 to 43"):
        list(BatchLoader(datasets, plan, collation=dataclasses.replace(COLLATION, seq_length=32)))


def test_clustered_rows_are_as_long_as_the_plan_says(datasets, tmp_path):
    plan = make_plan(datasets, tmp_path, packing=False, length_clustering=True, length_multiple=8)
    loader = make_loader(datasets, plan, micro_batch_size=2)
    lengths = set()
    for number, batch in enumerate(loader):
        seq_length = plan.seq_length(number // loader.num_micro_batches)
        assert batch.input_ids.numel() == 2 * seq_length
        validate(batch, LANGUAGE, NUM_IMAGE_TOKENS, ImageShare())
        lengths.add(seq_length)
    assert len(lengths) > 2


def test_every_batch_is_sound(datasets, plan):
    for batch in make_loader(datasets, plan, micro_batch_size=2):
        validate(batch, LANGUAGE, NUM_IMAGE_TOKENS, ImageShare())


def test_rows_follow_the_plan_in_order(datasets, plan):
    loader = make_loader(datasets, plan, data_parallel_rank=1, data_parallel_size=2)
    batches = [next(loader) for _ in range(4)]
    assert [batch.sample_ids.tolist() for batch in batches] == [plan.row(row).tolist() for row in (1, 3, 5, 7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_loader_gives_the_batches_of_a_straight_run(datasets, plan, workers):
    straight = list(make_loader(datasets, plan, micro_batch_size=2))
    resumed = make_loader(datasets, plan, micro_batch_size=2, start_iteration=3, num_workers=workers)
    expected = straight[3 * resumed.num_micro_batches :]
    assert all(equal_batches(*pair) for pair in zip(resumed, expected, strict=True))


def test_loader_knows_its_iteration(datasets, plan):
    loader = make_loader(datasets, plan, start_iteration=2)
    assert loader.iteration == 2
    for _ in range(loader.num_micro_batches):
        next(loader)
    assert loader.iteration == 3


def test_loader_ends_with_the_plan(datasets, plan):
    loader = make_loader(datasets, plan, start_iteration=plan.num_iterations)
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_never_draws_from_the_global_generators(datasets, plan, workers):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = make_loader(datasets, plan, num_workers=workers)
    list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_image_shares_together_are_all_images(datasets, plan):
    whole = list(make_loader(datasets, plan, micro_batch_size=4))
    shares = [list(make_loader(datasets, plan, micro_batch_size=4, image_share=ImageShare(r, 3))) for r in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.pixel_values for part in parts]), batch.pixel_values)


def test_stage_without_pixels_gets_none(datasets, plan):
    batch = next(make_loader(datasets, plan, image_share=None))
    assert batch.pixel_values is None
    assert len(batch.image_token_index) == batch.num_images * NUM_IMAGE_TOKENS


def test_empty_rows_at_the_end_are_all_padding(datasets, tmp_path):
    plan = make_plan(datasets, tmp_path, global_batch_size=64, train_epochs=1)
    last = list(make_loader(datasets, plan, micro_batch_size=1))[-1]
    validate(last, LANGUAGE, NUM_IMAGE_TOKENS, ImageShare())
    assert (last.num_tokens, len(last.sample_ids), last.cu_seqlens.tolist()) == (0, 0, [0, 64])


def test_text_only_data_has_no_images(datasets, tmp_path):
    plan = make_plan(datasets[1:], tmp_path)
    batch = next(make_loader(datasets[1:], plan))
    assert batch.pixel_values.shape == (0, 3, 8, 8)


def test_label_datasets_name_the_blend_entry(datasets, plan):
    for batch in make_loader(datasets, plan):
        text_only = [index >= len(datasets[0]) for index in batch.sample_ids.tolist()]
        segment = torch.searchsorted(batch.cu_seqlens.long(), batch.label_index, right=True) - 1
        assert batch.label_datasets.tolist() == [int(text_only[index]) for index in segment.tolist()]


def test_killed_worker_gives_one_data_error(datasets, plan):
    loader = make_loader(datasets, plan, num_workers=1, prefetch_factor=1)
    next(loader)
    os.kill(loader._batches._workers[0].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"worker died.*iteration \d+, at or after .*\.bin sample \d+"):
        list(loader)
    assert time.monotonic() - started < 20


def test_killed_worker_does_not_interrupt_other_code(datasets, plan):
    loader = make_loader(datasets, plan, num_workers=1, prefetch_factor=1)
    (worker,) = loader._batches._workers
    os.kill(worker.pid, signal.SIGKILL)
    naps = 0
    while worker.is_alive() or naps < 10:  # a handler of torch would raise here
        time.sleep(0.05)
        naps += 1
    with pytest.raises(DataError, match="worker died"):
        list(loader)


def test_workers_ignore_signals_that_ask_the_job_to_stop(datasets, plan):
    expected = [batch.sample_ids.tolist() for batch in make_loader(datasets, plan)]
    loader = make_loader(datasets, plan, num_workers=2)
    found = [next(loader).sample_ids.tolist() for _ in range(2)]  # one of each worker: both are ready
    for worker in loader._batches._workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    found += [batch.sample_ids.tolist() for batch in loader]
    assert found == expected


def test_close_ends_the_workers(datasets, plan):
    loader = make_loader(datasets, plan, num_workers=2)
    next(loader)
    workers = list(loader._batches._workers)
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_leave_no_socket_once_their_loader_is_closed(datasets, plan, short_folder, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(short_folder))
    killed, running = (make_loader(datasets, plan, num_workers=2) for _ in range(2))
    for loader in (killed, running):
        for _ in range(2):
            next(loader)
    assert len(list(short_folder.rglob("listener-*"))) == 4
    killed.close()
    assert len(list(short_folder.rglob("listener-*"))) == 2
    next(running)
    running.close()
    assert not list(short_folder.iterdir())


def test_lock_that_a_killed_worker_held_does_not_keep_the_trainer(datasets, plan):
    loader = make_loader(datasets, plan, num_workers=1)
    next(loader)
    loader._batches._workers_done_event._cond.acquire()  # as a worker does for a moment
    loader.close()
    end = threading.Thread(target=loader._batches._shutdown_workers, daemon=True)  # what the iterator does at its end
    end.start()
    end.join(timeout=30)
    assert not end.is_alive()


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_names_dataset_shard_and_sample(tmp_path, workers):
    samples = make_samples(40, True, seed=1)
    samples[35] = EncodedSample((TextSegment(np.array([1], dtype=np.int32), True), ImageSegment(b"no image", (8, 8))))
    write_dataset(tmp_path / "d", samples, dataset_name="d", tokenizer=TOKENIZER, samples_per_shard=32)
    datasets = [ShardedDataset.open(tmp_path / "d")]
    loader = make_loader(datasets, make_plan(datasets, tmp_path), num_workers=workers)
    with pytest.raises(DataError, match=r"not a JPEG.*d/00001\.bin sample 3"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_flipped_bit_names_dataset_shard_and_sample(tmp_path, workers):
    write_dataset(
        tmp_path / "d", make_samples(40, True, seed=1), dataset_name="d", tokenizer=TOKENIZER, samples_per_shard=32
    )
    path = tmp_path / "d" / "00001.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    datasets = [ShardedDataset.open(tmp_path / "d")]
    loader = make_loader(datasets, make_plan(datasets, tmp_path), num_workers=workers)
    with pytest.raises(DataError, match=r"damaged.*d/00001\.bin sample \d"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_cannot_be_read_names_its_sample(datasets, plan, monkeypatch, workers):
    def fail(self, index, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ShardedDataset, "read", fail)
    with pytest.raises(DataError, match=r"cannot be read: .*Input/output error.*\.bin sample"):
        next(make_loader(datasets, plan, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [KeyError("surprise"), RuntimeError("surprise")])
def test_bug_of_ours_is_not_called_a_fault_of_the_data(datasets, plan, monkeypatch, workers, error):
    def fail(self, index, **options):
        raise error

    monkeypatch.setattr(ShardedDataset, "read", fail)
    with pytest.raises(RuntimeError, match=r"(?s)\.bin sample .*Traceback.*in fail.*surprise"):
        next(make_loader(datasets, plan, num_workers=workers))


def test_loader_refuses_a_batch_that_does_not_divide(datasets, plan):
    with pytest.raises(ValueError, match=r"4 rows is not a multiple .* = 3 \* 1"):
        make_loader(datasets, plan, data_parallel_size=3)
