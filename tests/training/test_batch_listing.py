import dataclasses

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.config import TrainConfig, load_config, save_config
from megatron_vlm.data.plan.ledger import Ledger
from megatron_vlm.data.plan.plan import build_plan
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.text.tokenizer_files import read_tokenizer_files
from tests.support.project import make_project


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder as two iterations leave it, its plan, and its dataset."""
    project = make_project(tmp_path_factory.mktemp("project"), num_samples=32)
    config = load_config(TrainConfig, str(project.config), [])
    shards, tokenizer = str(project.folder / "shards"), str(project.folder / "tokenizer.model")
    entry = dataclasses.replace(config.data.blend[0], path=shards)
    data = dataclasses.replace(config.data, blend=(entry,), tokenizer=tokenizer, seq_length=96)
    run_dir = project.run_dir
    config = dataclasses.replace(config, run_dir="moved since", data=data)
    dataset = ShardedDataset.open(shards)
    plan = build_plan(PlanSettings.from_config(config), [dataset], run_dir / "plan")
    save_config(config, run_dir / "config.yaml")
    read_tokenizer_files(tokenizer).copy_to(run_dir)
    ledger = Ledger(run_dir / "ledger", plan)
    for iteration in (1, 2):
        ledger.record(iteration, "hash")
    ledger.close()
    return run_dir, plan, dataset


def images_of(dataset, sample_id):
    return [part.encoded for part in dataset[sample_id].segments if isinstance(part, ImageSegment)]


def test_samples_of_an_iteration_are_listed_row_by_row(whole, capsys):
    run_dir, plan, dataset = whole
    assert main(["data", "inspect", str(run_dir), "--iteration", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    ids, per_row = plan.rows(1)
    rows = [row for row, count in enumerate(per_row) for _ in range(count)]
    assert [line.split(", tiny")[0] for line in lines] == [
        f"row {row}: id {sample_id}" for row, sample_id in zip(rows, ids, strict=True)
    ]
    for line, sample_id in zip(lines, ids, strict=True):
        assert f"({dataset.folder}/00000.bin sample {sample_id})" in line
        assert line.endswith(f"{len(images_of(dataset, sample_id))} images")
    tokens = [int(line.split(" tokens")[0].split()[-1]) for line in lines]
    assert head.startswith(f"iteration 2 of 4, done: {len(ids)} samples in 4 rows of 96 tokens, ")
    assert f", {sum(tokens)} tokens, " in head


def test_text_pictures_and_page_are_those_of_the_shards(whole, tmp_path, capsys):
    run_dir, plan, dataset = whole
    options = ["--text", "--pictures", str(tmp_path / "out"), "--output", str(tmp_path / "page.html")]
    assert main(["data", "inspect", str(run_dir), "--iteration", "1", *options]) == 0
    shown = capsys.readouterr().out
    ids, per_row = plan.rows(0)
    rows = [row for row, count in enumerate(per_row) for _ in range(count)]
    expected = {
        f"row_{row:04d}_id_{sample_id}_{place}.png": image
        for row, sample_id in zip(rows, ids.tolist(), strict=True)
        for place, image in enumerate(images_of(dataset, sample_id))
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    assert shown.count("<image>") == len(expected)
    assert (tmp_path / "page.html").read_text().count("<img ") == len(expected)


def test_an_iteration_that_is_not_done_is_shown_as_planned(whole, capsys):
    assert main(["data", "inspect", str(whole[0]), "--iteration", "3"]) == 0
    assert capsys.readouterr().out.startswith("iteration 3 of 4, not done yet: ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--iteration", "5"], 64, "iteration 5 of 4 does not exist"),
        (["--text"], 64, "--text and --pictures show a global batch"),
        ([], 64, "--tokenizer is missing"),
    ],
)
def test_wrong_use_is_one_line(whole, capsys, arguments, code, message):
    assert main(["data", "inspect", str(whole[0]), *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["data", "inspect", str(tmp_path), "--iteration", "1"]) == 78
    assert "folder has no config.yaml" in capsys.readouterr().err


def test_a_ledger_with_other_samples_than_the_plan_is_an_error(whole, tmp_path, capsys):
    run_dir, plan, _ = whole
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "plan"):
        (tmp_path / "run" / name).symlink_to(run_dir / name)
    ledger = Ledger(tmp_path / "run" / "ledger", plan)
    ledger.record(1, "hash")
    ledger.close()
    path = tmp_path / "run" / "ledger" / "sample_ids.bin"
    path.write_bytes(b"\x07" * 8 + path.read_bytes()[8:])
    assert main(["data", "inspect", str(tmp_path / "run"), "--iteration", "1"]) == 65
    assert "the ledger has other samples of iteration 1" in capsys.readouterr().err
