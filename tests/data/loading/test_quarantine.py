"""Samples in quarantine stay in the plan and are not trained on."""

import errno
import os
from pathlib import Path

import pytest

from megatron_vlm.config import BlendEntry, ConfigError, DataError, StorageError
from megatron_vlm.data.loading.collate import Collation
from megatron_vlm.data.loading.loader import BatchLoader
from megatron_vlm.data.loading.quarantine import Quarantine, check_quarantine, read_quarantine
from megatron_vlm.data.plan.plan import build_plan
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.writer import write_dataset
from tests.support.configs import tiny_run
from tests.support.lengths import make_settings
from tests.support.runs import TOKENIZER
from tests.support.samples import make_samples


@pytest.fixture
def datasets(tmp_path):
    samples = [placed.sample for placed in make_samples(40)]
    write_dataset(tmp_path / "shards", samples, dataset_name="tiny", tokenizer=TOKENIZER)
    return [ShardedDataset.open(tmp_path / "shards")]


@pytest.fixture
def plan(datasets, tmp_path):
    blend = (BlendEntry(path="shards"),)
    settings = make_settings(blend=blend, seq_length=192, overflow="truncate", global_batch_size=1)
    return build_plan(settings, datasets, tmp_path / "plan")


def batches(datasets, plan, quarantine=frozenset()):
    config = tiny_run()
    return list(
        BatchLoader(
            datasets, plan, collation=Collation.from_config(config.model, config.data), quarantine=frozenset(quarantine)
        )
    )


def test_a_sample_in_quarantine_keeps_its_place_and_takes_no_position(datasets, plan):
    ids = plan.sample_ids(1)
    whole, without = (batches(datasets, plan, quarantine)[1] for quarantine in ((), {int(ids[1])}))
    assert without.sample_ids.tolist() == whole.sample_ids.tolist()
    assert without.samples_per_row.tolist() == whole.samples_per_row.tolist()
    lengths = (whole.cu_seqlens[1:] - whole.cu_seqlens[:-1]).tolist()
    assert whole.num_tokens - without.num_tokens == lengths[1]
    assert whole.input_ids.shape == without.input_ids.shape
    assert len(without.label_index) < len(whole.label_index)


def test_other_batches_are_what_they_were(datasets, plan):
    left_out = set(plan.sample_ids(1).tolist())
    for number, (one, other) in enumerate(zip(batches(datasets, plan), batches(datasets, plan, left_out), strict=True)):
        assert (one.input_ids.tolist() == other.input_ids.tolist()) == (number != 1)
        if number == 1:
            assert (other.num_tokens, len(other.label_index), other.num_images) == (0, 0, 0)


def test_a_sample_in_quarantine_is_not_read(datasets, plan):
    bad = int(plan.sample_ids(0)[0])
    payload = next(datasets[0].folder.glob("*.bin"))
    content = bytearray(payload.read_bytes())
    first, last = (sum(_sizes(datasets[0])[:count]) for count in (bad, bad + 1))
    content[first:last] = bytes(last - first)
    payload.write_bytes(content)
    broken = [ShardedDataset.open(datasets[0].folder)]
    with pytest.raises(DataError):
        batches(broken, plan)
    assert len(batches(broken, plan, {bad})) == plan.num_iterations


def _sizes(dataset):
    return [
        sum(len(part.encoded) if hasattr(part, "encoded") else 4 * len(part.input_ids) for part in sample.segments)
        for sample in (dataset[number] for number in range(len(dataset)))
    ]


def test_a_file_is_read_line_by_line(plan, tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("3\n# bad pictures\n\n 17 # blurred\r\n3\n", encoding="utf-8-sig")
    found = read_quarantine(str(path), plan)
    assert found.ids == {3, 17}
    counts = [found.count(plan, iteration) for iteration in range(plan.num_iterations)]
    assert sum(counts) == 2
    assert Quarantine().count(plan, 0) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "'x' is not the id of a sample"),
        ("-1", "'-1' is not the id"),
        ("1 2", "'1 2' is not the id"),
        ("40", "there is no sample 40: the ids of data.blend reach from 0 to 39"),
        ("9" * 5000, "there is no sample 9+:"),
        ("y" * 5000, "y{40}.* is not the id"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(plan, tmp_path, line, message):
    path = tmp_path / "ids.txt"
    path.write_text(f"3\n{line}\n")
    with pytest.raises(DataError, match=message) as error:
        read_quarantine(str(path), plan)
    assert error.value.where == f"{path}:2"
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["missing.txt", "ids.txt/below", ""])
def test_a_path_that_names_no_file_is_a_wrong_setting(plan, tmp_path, name):
    (tmp_path / "ids.txt").touch()
    path = str(tmp_path / name)
    for read in (check_quarantine, lambda path: read_quarantine(path, plan)):
        with pytest.raises(ConfigError, match="data.quarantine cannot be read: ") as error:
            read(path)
        assert error.value.where == path


def test_a_disk_that_fails_is_no_wrong_setting(plan, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(StorageError, match=r"data.quarantine cannot be read: Input/output error"):
        read_quarantine(str(tmp_path / "ids.txt"), plan)
