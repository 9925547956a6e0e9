import dataclasses
import shutil

import pytest
import yaml

from megatron_vlm.checkpoint.manifest import read_manifest, write_manifest
from megatron_vlm.checkpoint.tensors import is_stacked, list_tensors, read_tensor, write_weights
from megatron_vlm.cli.main import main
from tests.support.configs import tiny_model
from tests.support.random_run import write_random_run
from tests.support.sentence_piece import NUM_PIECES, train_sentence_piece


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_run(folder / "run", tiny_model(vocab_size=NUM_PIECES), train_sentence_piece(folder))
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "run")


def flip_a_bit(run):
    file = max((run / "checkpoints" / "iter_0000000").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def test_list_has_a_line_for_each_checkpoint_newest_first(run, capsys):
    newer = shutil.copytree(run / "checkpoints" / "iter_0000000", run / "checkpoints" / "iter_0000007")
    write_manifest(newer, dataclasses.replace(read_manifest(run / "checkpoints" / "iter_0000000"), iteration=7))
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in lines] == ["iter_0000007", "iter_0000000"]
    assert all(line.endswith("has a manifest") for line in lines)


def test_verify_reads_every_byte(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("valid")
    name = flip_a_bit(run)
    assert main(["checkpoint", "verify", str(run)]) == 65
    shown = capsys.readouterr()
    assert name in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith(
        f"megatron-vlm: error: damaged checkpoints, listed above with their faults: 1 ({run}); fix: "
    )


def test_hash_is_that_of_the_weights(run, capsys):
    hashes = []
    for folder in (run, run / "checkpoints" / "iter_0000000"):
        assert main(["checkpoint", "hash", str(folder)]) == 0
        hashes.append(capsys.readouterr().out.split()[0])
    assert hashes[0] == hashes[1]
    assert len(bytes.fromhex(hashes[0])) == 32


def test_hash_of_damaged_weights_is_refused(run, capsys):
    name = flip_a_bit(run)
    assert main(["checkpoint", "hash", str(run)]) == 65
    assert name in capsys.readouterr().err


def test_diff_of_a_checkpoint_with_itself_finds_nothing(run, capsys):
    folder = run / "checkpoints" / "iter_0000000"
    assert main(["checkpoint", "diff", str(run), str(folder)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("0 of ")


def test_diff_names_each_tensor_that_differs_and_by_how_much(run, tmp_path, capsys):
    source = run / "checkpoints" / "iter_0000000"
    tensors = {key: read_tensor(source, key) for key in list_tensors(source)}
    changed = dict(tensors)
    stacked = next(key for key in tensors if is_stacked(key))
    plain, gone, other = [key for key in tensors if not is_stacked(key)][:3]
    changed[stacked] = tensors[stacked].clone()
    changed[stacked][1].view(-1)[:2] += 0.5
    changed[plain] = tensors[plain].clone()
    changed[plain].view(-1)[0] = float("nan")
    changed[other] = tensors[other][:-1].clone()
    del changed[gone]
    second = write_weights(tmp_path / "second", changed, yaml.safe_load((run / "config.yaml").read_text()))
    assert main(["checkpoint", "diff", str(run), str(second)]) == 65
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("4 of ")
    found = {line.split()[0]: line for line in lines}
    assert set(found) == {f"{stacked}[1]", plain, gone, other}
    size = tensors[stacked][1].numel()
    assert f"differs in 2 of {size} values, by up to 0.5 of values up to" in found[f"{stacked}[1]"]
    assert "differs in 1 of" in found[plain]
    assert "by up to nan" in found[plain]
    assert found[gone] == f"{gone} is only in {source}"
    assert f"is {list(tensors[other].shape)} float32 and {list(changed[other].shape)} float32" in found[other]


def test_diff_of_a_damaged_checkpoint_is_refused(run, whole, capsys):
    name = flip_a_bit(run)
    assert main(["checkpoint", "diff", str(whole), str(run)]) == 65
    assert name in capsys.readouterr().err


def test_folder_without_checkpoints_is_one_line(tmp_path, capsys):
    assert main(["checkpoint", "hash", str(tmp_path)]) == 65
    assert capsys.readouterr().err.count("\n") == 1
