import dataclasses
import shutil

import pytest

from megatron_vlm.checkpoint.manifest import read_manifest, write_manifest
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
    assert name in capsys.readouterr().out


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


def test_folder_without_checkpoints_is_one_line(tmp_path, capsys):
    assert main(["checkpoint", "hash", str(tmp_path)]) == 65
    assert capsys.readouterr().err.count("\n") == 1
