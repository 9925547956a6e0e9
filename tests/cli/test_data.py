import json

import numpy as np
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data.samples import EncodedSample, TextSegment, TokenizerFacts
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.sentence_piece import train_sentence_piece

FACTS = TokenizerFacts(name="tiny", sha256="ab" * 32, vocab_size=100, bos_id=1, eos_id=2)


@pytest.fixture
def dataset(tmp_path):
    samples = [EncodedSample((TextSegment(np.arange(1, 5, dtype=np.int32), True),))] * 3
    write_dataset(tmp_path / "d", samples, dataset_name="tiny", tokenizer=FACTS)
    return tmp_path / "d"


@pytest.fixture
def tiny_tokenizer(tmp_path):
    return train_sentence_piece(tmp_path)


def test_verify_of_a_whole_dataset_says_so(dataset, capsys):
    assert main(["data", "verify", str(dataset)]) == 0
    assert "whole; 3 documents = 3 used + 0 rejected; 3 samples, 0 images, 12 text tokens" in capsys.readouterr().out


def test_verify_of_a_damaged_dataset_lists_the_faults_and_exits_65(dataset, capsys):
    (dataset / "00000.bin").write_bytes(b"x")
    assert main(["data", "verify", str(dataset)]) == 65
    shown = capsys.readouterr()
    assert shown.out == "00000.bin: 1 bytes, but the manifest says 48\n"
    (line,) = shown.err.splitlines()
    assert line.startswith(f"megatron-vlm: error: dataset is damaged; faults listed above: 1 ({dataset}); fix: ")


def test_verify_of_nothing_is_one_line_and_exit_code_65(tmp_path, capsys):
    assert main(["data", "verify", str(tmp_path / "none")]) == 65
    assert capsys.readouterr().err.startswith("megatron-vlm: error: dataset folder does not exist")


def test_stats_as_text_json_and_png(dataset, tmp_path, capsys):
    assert main(["data", "stats", str(dataset)]) == 0
    assert "text tokens per sample       4.0" in capsys.readouterr().out
    assert main(["data", "stats", str(dataset), "--json", "--histograms", str(tmp_path / "plots")]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert len(list((tmp_path / "plots").glob("*.png"))) == 2


def test_inspect_with_another_tokenizer_is_exit_code_65(dataset, tmp_path, capsys):
    import sentencepiece

    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 5), model_prefix=str(prefix), vocab_size=10, minloglevel=2
    )
    command = ["data", "inspect", str(dataset), "--tokenizer", f"{prefix}.model", "--output", str(tmp_path / "p.html")]
    assert main(command) == 65
    assert "shards were prepared with tokenizer tiny" in capsys.readouterr().err


def test_split_names_what_it_wrote(dataset, tmp_path, capsys):
    assert main(["data", "split", str(dataset), str(tmp_path / "piece"), "--number", "1"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'piece-1-of-1'}: samples 3, images 0\n"
    assert main(["data", "split", str(dataset), str(tmp_path / "piece"), "--number", "2"]) == 78


@pytest.mark.parametrize("action", [[], ["verify"], ["stats"], ["inspect"], ["export"], ["merge"], ["split"]])
def test_help_is_shown(action, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data", *action, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "example" in shown
    assert " ".join(["  megatron-vlm data", *action]) in shown


def test_verify_of_a_file_is_one_line_and_exit_code_65(dataset, capsys):
    assert main(["data", "verify", str(dataset / "00000.bin")]) == 65
    error = capsys.readouterr().err
    assert error.startswith("megatron-vlm: error: path is a file, not the folder of a dataset")
    assert error.count("\n") == 1


def test_export_names_what_it_wrote(tmp_path, tiny_tokenizer, capsys):
    samples = [EncodedSample((TextSegment(np.arange(3, 5, dtype=np.int32), True),))] * 3
    write_dataset(tmp_path / "d", samples, dataset_name="tiny", tokenizer=load_tokenizer(tiny_tokenizer).facts)
    command = ["data", "export", str(tmp_path / "d"), "--output", str(tmp_path / "tars"), "--tokenizer"]
    command += [str(tiny_tokenizer), "--samples-per-shard", "2", "--workers", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'tars'}: samples 3, images 0, tars 2\n"
    assert main([*command, "--workers", "0"]) == 64
