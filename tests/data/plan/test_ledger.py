"""The ledger says which samples each iteration consumed, across kills and resumes."""

import dataclasses
import logging

import numpy as np
import pytest

from megatron_vlm.config import BlendEntry, DataError, StorageError
from megatron_vlm.data.loading.collate import Collation
from megatron_vlm.data.loading.loader import BatchLoader
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.ledger import Ledger, read_iteration
from megatron_vlm.data.plan.plan import build_plan
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.samples import TokenizerFacts
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.parallel.slicing import RankSlice
from tests.support.configs import VOCAB_SIZE, tiny_run
from tests.support.ledgers import read_ledger
from tests.support.samples import make_samples


class Lengths:
    def __init__(self, number: int) -> None:
        self.fingerprint = f"lengths of {number}"
        self.num_images = np.zeros(number, dtype=np.int32)
        self.text_lengths = np.arange(number, dtype=np.int32) % 50 + 1

    def __len__(self) -> int:
        return len(self.num_images)


@pytest.fixture
def plan(tmp_path):
    settings = PlanSettings(
        blend=(BlendEntry(path="d"),),
        seq_length=64,
        image_tokens=ImageTokens(4),
        packing=True,
        overflow="fail",
        seed=1,
        global_batch_size=4,
        train_iters=12,
        train_epochs=None,
    )
    return build_plan(settings, [Lengths(300)], tmp_path / "plan")


def record(folder, plan, start, stop):
    ledger = Ledger(folder, plan, start)
    for iteration in range(start + 1, stop + 1):
        ledger.record(iteration, f"hash {iteration}")
    ledger.close()


def assert_complete(folder, plan, stop):
    found = list(read_ledger(folder))
    assert [entry.iteration for entry, _ in found] == list(range(1, stop + 1))
    for entry, ids in found:
        assert ids.tolist() == plan.sample_ids(entry.iteration - 1).tolist()
        assert (entry.plan, entry.sample_ids_sha) == (plan.hash, f"hash {entry.iteration}")


def test_ledger_holds_the_samples_of_every_iteration(plan, tmp_path):
    record(tmp_path / "ledger", plan, 0, 12)
    assert_complete(tmp_path / "ledger", plan, 12)


def test_resumed_run_replaces_the_entries_after_its_start(plan, tmp_path):
    record(tmp_path / "ledger", plan, 0, 9)
    record(tmp_path / "ledger", plan, 5, 7)
    assert_complete(tmp_path / "ledger", plan, 7)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_entry_torn_by_a_kill_is_replaced(plan, tmp_path, cut):
    record(tmp_path / "ledger", plan, 0, 6)
    index = tmp_path / "ledger" / "iterations.jsonl"
    index.write_bytes(index.read_bytes()[:-cut])
    record(tmp_path / "ledger", plan, 5, 8)
    assert_complete(tmp_path / "ledger", plan, 8)


def test_missing_entries_are_named(plan, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        record(tmp_path / "ledger", plan, 3, 5)
    assert "no entries of iterations 1 to 3" in caplog.text


def test_record_refuses_an_iteration_out_of_turn(plan, tmp_path):
    ledger = Ledger(tmp_path / "ledger", plan, 4)
    with pytest.raises(ValueError, match="iteration 7 recorded after 4"):
        ledger.record(7, "hash")


def test_truncated_ids_are_found_at_resume(plan, tmp_path):
    record(tmp_path / "ledger", plan, 0, 3)
    (tmp_path / "ledger" / "sample_ids.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"sample_ids\.bin has fewer ids"):
        Ledger(tmp_path / "ledger", plan, 3)


def test_line_that_is_no_entry_is_found(plan, tmp_path):
    record(tmp_path / "ledger", plan, 0, 1)
    (tmp_path / "ledger" / "iterations.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="is not an entry"):
        Ledger(tmp_path / "ledger", plan, 1)


def test_folder_that_cannot_be_made_is_one_line(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="ledger cannot be written"):
        Ledger(tmp_path / "file" / "ledger", plan)


def test_full_disk_is_one_line(plan, tmp_path):
    ledger = Ledger(tmp_path / "ledger", plan)
    ledger._ids_file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(StorageError, match="No space left"):
        ledger.record(1, "hash")


def test_ledger_holds_what_the_loaders_of_all_ranks_handed_out(tmp_path):
    """Loaders read the plan row by row and never the ledger; together their rows are each of its iterations."""
    samples = [placed.sample for placed in make_samples(60)]
    facts = TokenizerFacts(name="tiny", sha256="0" * 64, vocab_size=VOCAB_SIZE, bos_id=1, eos_id=2)
    write_dataset(tmp_path / "shards", samples, dataset_name="tiny", tokenizer=facts, samples_per_shard=25)
    run = tiny_run(training={"train_iters": 5, "global_batch_size": 4})
    settings = dataclasses.replace(PlanSettings.from_config(run), blend=(BlendEntry(path="shards"),))
    datasets = [ShardedDataset.open(tmp_path / "shards")]
    plan = build_plan(settings, datasets, tmp_path / "plan")
    record(tmp_path / "ledger", plan, 0, 5)
    ranks = [RankSlice(data_parallel_rank=rank, data_parallel_size=2) for rank in range(2)]
    collation = Collation.from_config(run.model, run.data)
    loaders = [BatchLoader(datasets, plan, collation=collation, rank_slice=rank) for rank in ranks]
    entries = read_ledger(tmp_path / "ledger")
    assert len(entries) == plan.num_iterations == 5
    for _, recorded in entries:
        rows: dict[int, list[int]] = {}
        for rank, loader in zip(ranks, loaders, strict=True):
            for index in range(loader.num_micro_batches):
                batch = next(loader)
                counts = batch.samples_per_row.tolist()
                parts = batch.sample_ids.split(counts)
                rows |= {row: part.tolist() for row, part in zip(rank.rows(index), parts, strict=True)}
        assert sum((rows[row] for row in range(4)), []) == recorded.tolist()


def test_one_iteration_is_read_back_with_its_ids(tmp_path, plan):
    record(tmp_path, plan, 0, 5)
    found = read_iteration(tmp_path, 4)
    assert found.entry.sample_ids_sha == "hash 4"
    assert found.sample_ids.tolist() == plan.sample_ids(3).tolist()
    assert read_iteration(tmp_path, 6) is None
    assert read_iteration(tmp_path / "none", 1) is None
    (tmp_path / "sample_ids.bin").write_bytes(b"")
    with pytest.raises(DataError, match="fewer ids"):
        read_iteration(tmp_path, 1)
