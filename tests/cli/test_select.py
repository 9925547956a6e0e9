import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_vlm.cli.main import main


@pytest.fixture
def coyo(tmp_path):
    folder = tmp_path / "coyo"
    folder.mkdir()
    for number in range(2):
        scores = [0.1 * number + 0.01 * row for row in range(5)]
        table = pyarrow.table({"url": [f"u{row}" for row in range(5)], "b32": scores, "l14": scores})
        pyarrow.parquet.write_table(table, folder / f"part-{number}.parquet")
    return folder


def select(coyo, output, *more) -> int:
    return main(["select", "pairs", "--input", str(coyo), "--output", str(output), "--by", "b32 + l14", *more])


def test_top_pairs_of_a_folder_are_written_and_counted(coyo, tmp_path, capsys):
    assert select(coyo, tmp_path / "out", "--top", "0.003K") == 0
    assert pyarrow.parquet.read_table(tmp_path / "out").column("url").to_pylist() == ["u2", "u3", "u4"]
    assert "rows 10 = kept 3 + dropped 7 (score_too_low 7)" in capsys.readouterr().out


def test_pairs_of_a_url_are_those_of_the_files(coyo, tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    fsspec.filesystem("memory").put(f"{coyo}/*", "/coyo/")
    assert select(coyo, tmp_path / "files", "--top", "3") == 0
    for name, url in (("folder", "memory://coyo"), ("pattern", "memory://coyo/*.parquet")):
        assert select(url, tmp_path / name, "--top", "3") == 0
        assert pyarrow.parquet.read_table(tmp_path / name).equals(pyarrow.parquet.read_table(tmp_path / "files"))


def test_a_file_that_is_no_parquet_by_its_name_is_exit_code_78(coyo, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("url")
    assert select(tmp_path / "list.csv", tmp_path / "out", "--top", "1") == 78
    assert "file of --input is not one of .parquet" in capsys.readouterr().err


def test_fraction_and_min_score_reach_the_selection(coyo, tmp_path, capsys):
    assert select(coyo, tmp_path / "out", "--fraction", "0.4", "--min-score", "0.2") == 0
    assert "kept 2 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (["--top", "lots"], "--top lots is not a positive number"),
        (["--fraction", "1/0"], "--fraction 1/0 is not a positive number"),
        (["--top", "1", "--fraction", "1"], "not allowed with"),
        ([], "required"),
    ],
)
def test_wrong_amount_is_exit_code_64(coyo, tmp_path, amount, message, capsys):
    assert select(coyo, tmp_path / "out", *amount) == 64
    line = capsys.readouterr().err
    assert line.startswith("megatron-vlm: error: ")
    assert message in line


def test_score_that_is_no_number_is_exit_code_64(coyo, tmp_path, capsys):
    assert select(coyo, tmp_path / "out", "--fraction", "0.4", "--min-score", "nan") == 64
    assert "'nan' is not a finite number" in capsys.readouterr().err


def test_missing_column_is_exit_code_65(coyo, tmp_path, capsys):
    assert select(coyo, tmp_path / "out", "--top", "1", "--by", "aesthetic") == 65
    assert "parquet file has no column aesthetic" in capsys.readouterr().err


def test_folder_without_parquet_is_exit_code_78(tmp_path, capsys):
    assert select(tmp_path, tmp_path / "out", "--top", "1") == 78
    assert "input has no parquet files" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [[], ["pairs"]])
def test_help_shows_an_example(kind, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["select", *kind, "--help"])
    assert caught.value.code == 0
    assert "megatron-vlm select pairs --input coyo-700m" in capsys.readouterr().out


@pytest.fixture
def flan(tmp_path):
    folder = tmp_path / "flan"
    folder.mkdir()
    for number in range(2):
        lines = [f'{{"inputs": "q {number} {line}", "targets": "a"}}\n' for line in range(5)]
        (folder / f"part-{number}.jsonl").write_text("".join([*lines, "{\n"]))
    return folder


def select_text(flan, output, number, *more) -> int:
    options = ["--input", str(flan), "--output", str(output), "--number", number, "--workers", "1", *more]
    return main(["select", "text", *options])


def test_text_records_are_chosen_and_counted(flan, tmp_path, capsys):
    assert select_text(flan, tmp_path / "out", "0.004K", "--seed", "7") == 0
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("*.jsonl")) == 4
    assert "records 12 = kept 4 + not chosen 6 + rejected 2 (json_syntax 2)" in capsys.readouterr().out


def test_wrong_number_of_text_records_is_exit_code_64(flan, tmp_path, capsys):
    assert select_text(flan, tmp_path / "out", "lots") == 64
    assert "--number lots is not a whole number above 0; fix: use --number 1M" in capsys.readouterr().err


def test_wrong_number_of_workers_for_text_is_exit_code_64(flan, tmp_path, capsys):
    assert select_text(flan, tmp_path / "out", "1", "--workers", "0") == 64
    assert "argument --workers: 0 is below 1" in capsys.readouterr().err


def test_help_of_text_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["select", "text", "--help"])
    assert caught.value.code == 0
    assert "megatron-vlm select text --input flan" in capsys.readouterr().out
