"""An export replaces an earlier export, and nothing else."""

import shutil

import pytest

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.cli.main import main
from megatron_vlm.config import UsageError
from megatron_vlm.convert.output import check_output


@pytest.fixture
def run(make_run, model_config, tmp_path):
    shutil.copytree(make_run(model_config), tmp_path / "runs" / "run")
    return tmp_path / "runs" / "run"


def replace(run, output):
    check_output(output, find_checkpoint(run), overwrite=True)


@pytest.mark.parametrize("place", [".", "..", "checkpoints"])
def test_the_checkpoint_is_not_replaced_by_its_export(run, place):
    with pytest.raises(UsageError, match="holds the checkpoint itself, so that --overwrite does not replace it"):
        replace(run, run / place)


def test_the_working_directory_is_not_replaced(run, tmp_path, monkeypatch):
    (tmp_path / "work" / "below").mkdir(parents=True)
    (tmp_path / "work" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "work" / "below")
    with pytest.raises(UsageError, match="holds the working directory"):
        replace(run, tmp_path / "work")


def test_what_is_no_export_is_not_replaced(run, tmp_path):
    (tmp_path / "texts").mkdir()
    replace(run, tmp_path / "texts")  # empty
    (tmp_path / "texts" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="texts is no export"):
        replace(run, tmp_path / "texts")
    with pytest.raises(UsageError, match="other is no export"):
        replace(run, shutil.copytree(run, tmp_path / "other"))


@pytest.mark.parametrize("format", ["llava", "peft", "gguf"])
def test_every_format_leaves_the_run_that_it_exports(run, format, capsys):
    command = ["convert", "to-hf", str(run), "--format", format, "--output", str(run), "--overwrite"]
    assert main(command) == 64
    assert "holds the checkpoint itself" in capsys.readouterr().err
    assert find_checkpoint(run).is_dir()


def test_an_import_does_not_fill_a_model_folder(exported, capsys):
    before = sorted(path.name for path in exported.iterdir())
    assert main(["convert", "from-hf", "--model", str(exported), "--output", str(exported)]) == 64
    assert "is a model folder, not a run" in capsys.readouterr().err
    assert sorted(path.name for path in exported.iterdir()) == before
