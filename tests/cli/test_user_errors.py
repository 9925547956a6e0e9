"""What users get wrong, by kind: one line with its exit code, before a rank starts, and nothing else is left."""

import pytest

from megatron_vlm.cli import train
from megatron_vlm.cli.main import main

SETTINGS = [
    "optimizer.lrr=1",
    "optimiser.lr=1",
    "optimizer.lr=[1, 2]",
    "optimizer.lr={a: 1}",
    "optimizer.lr=null",
    "optimizer.lr=.nan",
    "optimizer.lr='1e-4x'",
    "optimizer.lr",
    "optimizer.lr.x=1",
    "optimizer.lr=" + "[" * 10_000,
    "training.global_batch_size=true",
    "training.global_batch_size=-4",
    "training.global_batch_size=3",
    "training.seed=" + "9" * 5000,
    "training.hooks=[wandb]",
    "training.freeze=[visionmodel]",
    "model.vision.type=../clip",
    "model.language={preset: vicuna_7bb}",
    "model.language.num_attention_heads=3",
    "model.language.kv_channels=7",
    "model.language.rotary_base=0",
    "model.vision.image_std=[0, 1, 1]",
    "parallel.tensor_model_parallel_size=3",
    "data.blend=[{path: shards, weight: -1}]",
    "data.blend=shards",
    "data.tokenizer=shards",
    "run_dir=" + "a" * 5000,
    "run_dir=train.yaml",
]
FILES = {
    "empty": b"",
    "a list": b"- a\n",
    "not UTF-8": b"# \xff\n",
    "UTF-16": "stage: sft".encode("utf-16"),
    "tabs": b"optimizer:\n\tlr: 1\n",
    "a key twice": b"stage: sft\nstage: sft\n",
    "code": b"stage: !!python/object/apply:os.system ['touch canary']\n",
    "an alias of itself": b"&a a: *a\n",
    "its own base": b"base: broken.yaml\n",
    "no such base": b"base: gone.yaml\n",
}


@pytest.fixture
def folder(project, monkeypatch):
    """The folder of a tiny project, in which no rank may start."""

    def fail(*arguments):
        raise AssertionError("a rank was started")

    monkeypatch.setattr(train, "run_node", fail)
    monkeypatch.chdir(project.folder)
    return project.folder


def the_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-vlm: error: ")
    assert "; fix: " in line
    assert len(line) <= 300
    return line


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[:40])
def test_wrong_setting_is_one_line_and_exit_code_78(folder, capsys, setting):
    assert main(["train", "train.yaml", "--nproc-per-node", "2", setting]) == 78
    the_line(capsys)
    assert not (folder / "run" / "config.yaml").exists()


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_config_file_that_cannot_be_read_is_one_line_and_exit_code_78(folder, capsys, content):
    (folder / "broken.yaml").write_bytes(content)
    assert main(["train", "broken.yaml", "--nproc-per-node", "2"]) == 78
    assert "yaml" in the_line(capsys)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("place", ["gone", "train.yaml", "."])
def test_dataset_that_is_none_is_one_line_and_exit_code_65(folder, capsys, place):
    assert main(["train", "train.yaml", f"data.blend=[{{path: {place}}}]", "--nproc-per-node", "2"]) == 65
    the_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--output", "/proc/shards"], 74),
        (["--output", "tokenizer.model/shards"], 64),
        (["--output", "shards"], 78),
        (["--output", "new", "--tokenizer", "train.yaml"], 78),
        (["--output", "new", "--tokenizer", "gone"], 78),
        (["--output", "new", "--input", "gone.jsonl"], 78),
        (["--output", "new", "--workers", "0"], 64),
        (["--output", "new", "--part", "3/2"], 64),
    ],
)
def test_wrong_options_of_a_preparation_are_one_line(folder, capsys, arguments, code):
    (folder / "text.jsonl").write_text('{"text": "a text"}\n')
    defaults = ["--input", "text.jsonl", "--tokenizer", "tokenizer.model", "--workers", "1"]
    assert main(["prepare", "text", *defaults, *arguments]) == code
    the_line(capsys)
    assert not (folder / "new").exists()
