import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from PIL import Image as PILImage

from megatron_vlm.cli.main import main
from megatron_vlm.data.shards.manifest import load_manifest


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """The four raw corpora and a tokenizer, as small as they get."""
    root = tmp_path_factory.mktemp("corpora")
    (root / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(root / "images" / f"{number}.jpg")
    lines = {
        "mmc4/docs_shard_0_v3.jsonl": [
            {"url": "u", "text_list": ["a", "b"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 1}]},
            {"url": "bad", "text_list": ["a"], "image_info": [{"image_name": "9.jpg", "matched_text_index": 0}]},
        ],
        "pairs/pairs.jsonl": [{"image": "1.jpg", "caption": "a cat"}, {"image": "1.jpg", "caption": ""}],
        "flan.jsonl": [{"inputs": "what?", "targets": "a cat"}],
        "llava.json": [
            {
                "id": "x",
                "image": "images/2.jpg",
                "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
            }
        ],
    }
    for name, records in lines.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and b dog what USER ASSISTANT"] * 5),
        model_prefix=str(root / "tiny"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return root


COMMANDS = {
    "interleaved": "--input {root}/mmc4 --images {root}/images",
    "pairs": "--input {root}/pairs --images {root}/images",
    "conversations": "--input {root}/llava.json --images {root}",
    "text": "--input {root}/flan.jsonl",
}


def run(corpora, kind, output, *more) -> int:
    options = COMMANDS[kind].format(root=corpora).split()
    tokenizer = str(corpora / "tiny.model")
    return main(["prepare", kind, *options, "--output", str(output), "--tokenizer", tokenizer, "--workers", "1", *more])


@pytest.mark.parametrize(("kind", "source"), [("interleaved", "mmc4"), ("pairs", "coyo"), ("conversations", "llava")])
def test_each_kind_writes_a_dataset_that_verifies(corpora, tmp_path, kind, source, capsys):
    assert run(corpora, kind, tmp_path / "d") == 0
    manifest = load_manifest(tmp_path / "d")
    assert manifest.dataset_name == source
    assert manifest.documents == manifest.counts.samples + manifest.rejected
    assert f"documents {manifest.documents} = used 1 + rejected {manifest.rejected}" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / "d"), "--decode"]) == 0


def test_text_is_prepared_without_a_system_prompt(corpora, tmp_path):
    assert run(corpora, "text", tmp_path / "none") == 0
    assert run(corpora, "text", tmp_path / "default", "--system", "default") == 0
    counts = [load_manifest(tmp_path / name).counts for name in ("none", "default")]
    assert counts[0].text_tokens < counts[1].text_tokens
    assert counts[0].trained_tokens == counts[1].trained_tokens


def test_source_name_and_options_reach_the_manifest(corpora, tmp_path):
    assert (
        run(corpora, "interleaved", tmp_path / "d", "--source", "web", "--variant", "pairs", "--max-images", "2") == 0
    )
    manifest = load_manifest(tmp_path / "d")
    assert manifest.dataset_name == "web"
    assert manifest.options["recipe"]["variant"] == "pairs"
    assert manifest.options["rules"]["max_images"] == 2


def test_parts_are_written_beside_the_output_and_merged(corpora, tmp_path, capsys):
    assert run(corpora, "text", tmp_path / "d", "--part", "1/1") == 0
    part = tmp_path / "d.part-1-of-1"
    assert f"wrote {part}" in capsys.readouterr().out
    assert main(["data", "merge", str(tmp_path / "d"), str(part)]) == 0
    assert "documents 1 = used 1 + rejected 0" in capsys.readouterr().out
    assert run(corpora, "text", tmp_path / "d") == 0  # is the very dataset, so that there is nothing to do
    assert main(["data", "merge", str(tmp_path / "d"), str(tmp_path / "d")]) == 78


@pytest.mark.parametrize("part", ["x", "2/1", "1/9"])
def test_wrong_part_is_exit_code_64(corpora, tmp_path, part, capsys):
    assert run(corpora, "text", tmp_path / "d", "--part", part) == 64
    assert f"--part {part}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-aspect-ratio nan", "'nan' is not a finite number"),
        ("--max-aspect-ratio 0.5", "0.5 is below 1"),
        ("--min-similarity nan", "'nan' is not a finite number"),
        ("--min-images 9 --max-images 6", "--min-images 9 is above --max-images 6"),
        ("--variant pairs --image-place after", "--variant pairs takes the sentence after an image"),
        ("--min-image-bytes 9 --max-image-bytes 6", "--min-image-bytes 9 is above --max-image-bytes 6"),
    ],
)
def test_options_that_leave_nothing_are_exit_code_64_before_anything_is_written(
    corpora, tmp_path, options, message, capsys
):
    assert run(corpora, "interleaved", tmp_path / "d", *options.split()) == 64
    assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_missing_tokenizer_is_one_line_and_exit_code_78(corpora, tmp_path, capsys):
    code = main(["prepare", "text", "--input", "x", "--output", str(tmp_path / "d"), "--tokenizer", "none.model"])
    assert code == 78
    error = capsys.readouterr().err
    assert error.startswith("megatron-vlm: error: tokenizer cannot be read")
    assert error.count("\n") == 1


def test_missing_input_is_exit_code_78(corpora, tmp_path, capsys):
    tokenizer = str(corpora / "tiny.model")
    code = main(["prepare", "text", "--input", "none", "--output", str(tmp_path / "d"), "--tokenizer", tokenizer])
    assert code == 78
    assert "input does not exist (none)" in capsys.readouterr().err


def test_interleaved_documents_in_tars_and_parquet_are_told_by_their_files(corpora, tmp_path):
    image = (corpora / "images" / "0.jpg").read_bytes()
    record = json.dumps({"texts": ["a", None, "b"], "images": [None, "0.jpg", None]}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("k.json", record), ("k.0.jpg", image)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    columns = {"texts": [["a", None, "b"]], "images": [[None, image, None]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    options = ["--tokenizer", str(corpora / "tiny.model"), "--workers", "1"]
    for name in ("a.tar", "a.parquet"):
        output = tmp_path / f"{name}.shards"
        command = ["prepare", "interleaved", "--input", str(tmp_path / name), "--output", str(output)]
        assert main([*command, *options]) == 0
        assert main(["data", "verify", str(output)]) == 0
    first, second = (load_manifest(tmp_path / f"{name}.shards") for name in ("a.tar", "a.parquet"))
    assert first.shards[0].files == second.shards[0].files
    assert first.options["format"] != second.options["format"]


def test_similarities_of_parquet_are_exit_code_78(corpora, tmp_path, capsys):
    pyarrow.parquet.write_table(pyarrow.table({"texts": [["a"]], "images": [[None]]}), tmp_path / "a.parquet")
    given = ["--input", str(tmp_path / "a.parquet"), "--min-similarity", "0.2"]
    assert run(corpora, "interleaved", tmp_path / "d", *given) == 78
    assert "leave out --min-similarity" in capsys.readouterr().err


def test_urls_stand_for_paths(corpora, tmp_path):
    assert run(corpora, "interleaved", tmp_path / "a") == 0
    given = ["--input", f"file://{corpora}/mmc4/*.jsonl", "--images", f"file://{corpora}/images"]
    assert run(corpora, "interleaved", tmp_path / "b", *given) == 0
    assert load_manifest(tmp_path / "a") == load_manifest(tmp_path / "b")


def test_missing_bucket_is_exit_code_78(corpora, tmp_path, capsys):
    assert run(corpora, "pairs", tmp_path / "d", "--input", "memory://none/*.tar") == 78
    assert "no file matches --input (memory://none/*.tar)" in capsys.readouterr().err
    assert run(corpora, "pairs", tmp_path / "d", "--images", "memory://none/images") == 78
    assert "image folder does not exist (memory://none/images)" in capsys.readouterr().err


def test_missing_image_folder_is_exit_code_78(corpora, tmp_path, capsys):
    assert run(corpora, "pairs", tmp_path / "d", "--images", str(tmp_path / "none")) == 78
    assert "image folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("images", [["--images", "."], ["--images", "../images"], []])
def test_images_of_the_current_folder_are_found(corpora, tmp_path, monkeypatch, images):
    shutil.copytree(corpora / "images", tmp_path / "images")
    shutil.copy(corpora / "pairs" / "pairs.jsonl", tmp_path / "images")
    monkeypatch.chdir(tmp_path / "images")
    more = ["--tokenizer", str(corpora / "tiny.model"), "--workers", "1"]
    assert main(["prepare", "pairs", "--input", "pairs.jsonl", *images, "--output", "../d", *more]) == 0
    assert load_manifest(tmp_path / "d").counts.images == 1


@pytest.mark.parametrize("images", ["images.tar", "images.TAR", "im*.tar", "images.tar.gz", "*.tar*"])
def test_images_are_a_tar_or_a_pattern_of_tars_too(corpora, tmp_path, monkeypatch, images, capsys):
    monkeypatch.chdir(tmp_path)
    name = images.replace("im*", "images").replace("*.tar*", "x.tar.gz")
    with tarfile.open(name, "w") as archive:
        archive.add(corpora / "images" / "1.jpg", "1.jpg")
    code = run(corpora, "pairs", tmp_path / "d", "--images", images)
    if name.endswith(".gz"):
        assert code == 78
        assert f"file of --images is not one of .tar ({name})" in capsys.readouterr().err
    else:
        assert code == 0
        assert load_manifest(tmp_path / "d").counts.images == 1


def test_template_that_the_tokenizer_lacks_is_refused_before_reading(corpora, tmp_path, capsys):
    assert run(corpora, "text", tmp_path / "d", "--template", "llama_3") == 78
    assert "needs the token <|start_header_id|>" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_number_of_workers_is_checked(corpora, tmp_path, capsys):
    assert run(corpora, "text", tmp_path / "d", "--workers", "0") == 64
    assert "argument --workers: 0 is below 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "conversations"])
@pytest.mark.parametrize("name", ["", " "])
def test_a_source_without_a_name_is_exit_code_64(corpora, tmp_path, capsys, kind, name):
    assert run(corpora, kind, tmp_path / "d", "--source", name) == 64
    assert "--source is empty" in capsys.readouterr().err


def test_nothing_but_rejects_is_exit_code_65(corpora, tmp_path, capsys):
    assert run(corpora, "pairs", tmp_path / "d", "--min-side", "1000") == 65
    assert "none of 2 documents became a sample" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["interleaved", "pairs", "conversations", "text", None])
def test_help_shows_an_example(kind, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *([kind] if kind else []), "--help"])
    assert caught.value.code == 0
    assert f"megatron-vlm prepare {kind or 'interleaved'} --input" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--ray-address", "auto"], ["--jpeg-quality", "50"]])
def test_an_option_without_the_one_it_belongs_to_is_exit_code_64(corpora, tmp_path, capsys, option):
    assert run(corpora, "pairs", tmp_path / "d", *option) == 64
    assert f"{option[0]} has no effect without --" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_of_a_scheduler_asks_to_be_requeued_and_the_next_run_goes_on(corpora, tmp_path, number):
    arguments = ["prepare", "text", *COMMANDS["text"].format(root=corpora).split(), "--output", str(tmp_path / "d")]
    arguments += ["--tokenizer", str(corpora / "tiny.model")]
    code = (
        "import time, megatron_vlm.data.prepare.run as module\n"
        "module.run_tasks = lambda *_, **__: (print('running', flush=True), time.sleep(60))\n"
        f"from megatron_vlm.cli.main import main; main({arguments!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"running\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == 75
        line = f"megatron-vlm: stopped by {number.name}; run the same command again, finished input files are kept\n"
        assert process.stderr.read().decode() == line
    assert main(arguments) == 0
