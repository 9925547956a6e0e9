"""A saved plan is the computed one, found again by a hash of everything that it depends on."""

import json
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest

from megatron_vlm.config import BlendEntry, DataError, StorageError
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.plan import build_plan, hash_plan, open_plan, plan_rows
from megatron_vlm.platform.files.durable import UNFINISHED
from tests.support.lengths import Lengths, Questions, make_dataset, make_settings


@pytest.fixture
def datasets():
    return [make_dataset(200), make_dataset(90, seed=1)]


def test_saved_fragments_are_those_of_the_plan(tmp_path):
    datasets = [Lengths([0, 0], [300, 5]), Lengths([9], [20])]
    plan = build_plan(make_settings(overflow="split"), datasets, tmp_path)
    assert [plan.fragments.find(number) for number in range(4)] == [
        (0, 0, 128),
        (1, 0, None),
        (2, 0, 116),
        (0, 128, 256),
    ]


def test_plan_without_split_has_no_fragments(datasets, tmp_path):
    assert build_plan(make_settings(), datasets, tmp_path).fragments is None


def test_saved_plan_is_the_computed_one(datasets, tmp_path):
    plan, rows = build_plan(make_settings(), datasets, tmp_path), plan_rows(make_settings(), datasets)
    found = [plan.row(index) for index in range(rows.summary.num_rows)]
    assert np.concatenate(found).tolist() == rows.sample_ids.tolist()
    assert list(map(len, found)) == np.diff(rows.row_borders).tolist()


def test_iteration_is_its_rows_in_order(datasets, tmp_path):
    plan = build_plan(make_settings(), datasets, tmp_path)
    for iteration in range(plan.num_iterations):
        rows = [plan.row(iteration * 8 + row) for row in range(8)]
        ids, samples_per_row = plan.rows(iteration)
        assert ids.tolist() == plan.sample_ids(iteration).tolist() == np.concatenate(rows).tolist()
        assert samples_per_row.tolist() == list(map(len, rows))


def test_plan_knows_the_row_length_of_every_iteration(datasets, tmp_path):
    clustered = make_settings(packing=False, length_clustering=True)
    plan, rows = build_plan(clustered, datasets, tmp_path), plan_rows(clustered, datasets)
    assert [plan.seq_length(iteration) for iteration in range(plan.num_iterations)] == rows.seq_lengths.tolist()
    assert build_plan(make_settings(), datasets, tmp_path).seq_length(0) == 128
    with pytest.raises(IndexError, match="iteration"):
        plan.seq_length(plan.num_iterations)


def test_rows_after_the_last_sample_are_empty(datasets, tmp_path):
    plan = build_plan(make_settings(global_batch_size=64), datasets, tmp_path)
    assert plan.num_rows % 64 == 0
    sizes = [len(plan.row(index)) for index in range(plan.num_rows)]
    assert min(sizes[: plan.summary.num_rows]) > 0
    assert max(sizes[plan.summary.num_rows :], default=0) == 0


def test_second_build_opens_the_first(datasets, tmp_path):
    first = build_plan(make_settings(), datasets, tmp_path)
    written = (first.folder / "plan.json").stat().st_mtime_ns
    assert build_plan(make_settings(), datasets, tmp_path).folder == first.folder
    assert (first.folder / "plan.json").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [first.hash]


def test_what_a_killed_build_left_is_removed(datasets, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f"0123456789abcdef.{socket.gethostname()}.{gone.pid}{UNFINISHED}"
    left.mkdir()
    build_plan(make_settings(), datasets, tmp_path)
    assert not left.exists()


def test_pickled_plan_carries_no_arrays(datasets, tmp_path):
    plan = build_plan(make_settings(), datasets, tmp_path)
    content = pickle.dumps(plan)
    assert len(content) < 2000
    assert pickle.loads(content).sample_ids(0).tolist() == plan.sample_ids(0).tolist()


@pytest.mark.parametrize(
    "changes",
    [{"seed": 4}, {"seq_length": 256}, {"train_epochs": 2.0}, {"global_batch_size": 4}, {"packing": False}]
    + [
        {"overflow": "drop"},
        {"overflow": "split"},
        {"image_tokens": ImageTokens(8)},
        {"image_tokens": ImageTokens(function=max, identity="max")},
        {"sample_multiple": 2},
        {"max_images_per_row": 3},
        {"packing": False, "length_clustering": True},
        {"blend": (BlendEntry(path="a"), BlendEntry(path="b", epochs=2))},
    ],
)
def test_hash_depends_on_every_setting(datasets, changes):
    assert hash_plan(make_settings(**changes), datasets) != hash_plan(make_settings(), datasets)


def test_data_hash_depends_on_everything_but_the_length_of_the_training(datasets, tmp_path):
    first, longer, other = (
        build_plan(make_settings(**changes), datasets, tmp_path).hashes.data
        for changes in ({}, {"train_epochs": None, "train_iters": 3}, {"seed": 4})
    )
    assert first == longer != other


def test_data_hash_depends_on_the_images_of_a_row_so_that_resume_refuses_another_number(datasets, tmp_path):
    hashes = {
        build_plan(make_settings(max_images_per_row=most), datasets, tmp_path).hashes.data for most in (None, 3, 4)
    }
    assert len(hashes) == 3


def test_hash_without_new_settings_is_that_of_earlier_versions(datasets):
    # Computed at commit ed91503, before max_images_per_row.
    assert hash_plan(make_settings(), datasets) == "23d09bfa83390b19"


def test_row_multiple_matters_with_clustering_alone(datasets):
    plain, clustered = (
        {hash_plan(make_settings(packing=False, length_clustering=on, length_multiple=n), datasets) for n in (8, 16)}
        for on in (False, True)
    )
    assert (len(plain), len(clustered)) == (1, 2)


def test_hash_depends_on_the_datasets(datasets):
    assert hash_plan(make_settings(), datasets) != hash_plan(make_settings(), datasets[::-1])


def test_hash_does_not_depend_on_where_the_datasets_lie(datasets):
    moved = make_settings(blend=(BlendEntry(path="elsewhere"), BlendEntry(path="b")))
    assert hash_plan(moved, datasets) == hash_plan(make_settings(), datasets)


def test_row_outside_the_plan_is_an_index_error(datasets, tmp_path):
    plan = build_plan(make_settings(), datasets, tmp_path)
    with pytest.raises(IndexError, match="row"):
        plan.row(plan.num_rows)
    with pytest.raises(IndexError, match="iteration"):
        plan.sample_ids(plan.num_iterations)


def test_missing_plan_is_refused(datasets, tmp_path):
    with pytest.raises(DataError, match="plan is missing"):
        open_plan(make_settings(), datasets, tmp_path)


@pytest.mark.parametrize("name", ["sample_ids.npy", "row_borders.npy"])
def test_flipped_bit_of_a_plan_is_found(datasets, tmp_path, name):
    path = build_plan(make_settings(), datasets, tmp_path).folder / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"plan is damaged: {name}"):
        open_plan(make_settings(), datasets, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"summary": {}})])
def test_damaged_summary_is_found(datasets, tmp_path, text):
    path = build_plan(make_settings(), datasets, tmp_path).folder / "plan.json"
    path.write_text(text)
    with pytest.raises(DataError, match="plan is damaged"):
        open_plan(make_settings(), datasets, tmp_path)


def test_folder_that_cannot_be_written_is_one_line(datasets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="plan cannot be written"):
        build_plan(make_settings(), datasets, tmp_path / "file")


def test_hash_depends_on_the_function_of_the_image_tokens(datasets):
    hashes = {
        hash_plan(make_settings(image_tokens=ImageTokens(function=max, identity=identity)), datasets)
        for identity in ("a", "b")
    }
    assert len(hashes) == 2


def test_saved_plan_of_images_of_different_lengths_is_opened_again(datasets, tmp_path):
    changes = {"image_tokens": ImageTokens(function=max, identity="the longer side")}
    first = build_plan(make_settings(**changes), datasets, tmp_path)
    again = open_plan(make_settings(**changes), datasets, tmp_path)
    assert again.summary == first.summary
    assert json.loads((first.folder / "plan.json").read_text())["settings"]["image_tokens"] == "the longer side"


@pytest.mark.parametrize(("when", "named"), [("from_iteration", "iteration 900000"), ("from_tokens", "900000 tokens")])
def test_a_step_behind_the_end_is_warned_of(tmp_path, datasets, caplog, when, named):
    later = BlendEntry(path="b", **{when: 900_000})
    settings = make_settings(
        blend=(BlendEntry(path="a"), BlendEntry(path="b"), later), train_iters=9, train_epochs=None
    )
    plan = build_plan(settings, datasets, tmp_path)
    assert not plan.summary.step_iterations
    assert f"the step of data.blend from {named} never begins: there are {plan.num_iterations}" in caplog.text


@pytest.fixture
def cut_off():
    """Of the first dataset, one sample of two has nothing to train within a row."""
    return [Questions([200, 5], [0, 0], [50, 5]), Questions([5], [0], [5])]


def test_what_is_left_out_changes_the_hash_of_the_plan_but_not_its_folder(cut_off, tmp_path):
    settings = make_settings(overflow="truncate")
    plan, name = build_plan(settings, cut_off, tmp_path), hash_plan(settings, cut_off)
    assert (plan.folder.name, plan.hash) == (name, hash_plan(settings, cut_off, (1, 0)))
    assert plan.hash != name
    assert open_plan(settings, cut_off, tmp_path).hashes == plan.hashes
    assert plan.hashes.datasets[1] == build_plan(make_settings(overflow="drop"), cut_off, tmp_path).hashes.datasets[1]


def test_plan_without_a_cut_has_the_hash_of_settings_and_datasets(datasets, tmp_path):
    settings = make_settings(overflow="truncate")
    assert build_plan(settings, datasets, tmp_path).hash == hash_plan(settings, datasets)


def test_plan_of_a_version_that_left_nothing_out_stays_in_use(cut_off, tmp_path):
    settings = make_settings(overflow="truncate")
    plan = build_plan(settings, cut_off, tmp_path)
    tree = json.loads((plan.folder / "plan.json").read_text())
    del tree["summary"]["nothing_to_train"]
    tree["summary"]["hash"] = hash_plan(settings, cut_off)
    (plan.folder / "plan.json").write_text(json.dumps(tree))
    old = build_plan(settings, cut_off, tmp_path)
    assert old.hash == hash_plan(settings, cut_off)
    assert old.hashes.data != plan.hashes.data


def test_what_is_left_out_is_logged_by_dataset(cut_off, tmp_path, caplog):
    caplog.set_level("INFO")
    build_plan(make_settings(overflow="truncate"), cut_off, tmp_path)
    first, second = (record.message for record in caplog.records)
    assert "0 truncated, 0 split, 0 dropped, 1 with nothing_to_train left" in first
    assert second.startswith("a: 1 samples are left out, because the cut at data.seq_length=128 leaves no token with")
