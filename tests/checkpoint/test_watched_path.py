import torch

from megatron_vlm.checkpoint import watched_path
from megatron_vlm.checkpoint.load import load_weights
from megatron_vlm.checkpoint.watched_path import WatchedPath
from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model
from tests.support.random_run import write_random_run

CONTENT = bytes(range(256)) * 40


def count_beats(monkeypatch):
    beats = []
    monkeypatch.setattr(watched_path, "beat", lambda: beats.append(1))
    return beats


def test_reading_gives_the_bytes_and_a_sign_of_life_for_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(watched_path, "_READ_BYTES", 1000)
    (tmp_path / "a.bin").write_bytes(CONTENT)
    for read in (
        lambda stream: stream.read(len(CONTENT)),
        lambda stream: bytes(into) if stream.readinto(into := bytearray(len(CONTENT))) else b"",
    ):
        beats = count_beats(monkeypatch)
        with (WatchedPath(tmp_path) / "a.bin").open("rb") as stream:
            assert read(stream) == CONTENT
        assert len(beats) >= len(CONTENT) // 1000


def test_other_ways_to_open_are_those_of_a_path(tmp_path):
    path = WatchedPath(str(tmp_path)) / "a.txt"
    with path.open("w", encoding="utf-8") as stream:
        stream.write("ä")
    with path.open(encoding="utf-8") as stream:
        assert stream.read() == "ä"


def test_weights_that_are_loaded_give_signs_of_life(one_rank, tmp_path, monkeypatch):
    model = tiny_model()
    write_random_run(tmp_path / "run", model, tmp_path / "tokenizer.model")
    chunks = build_model(model, ParallelConfig(), Computation(precision="fp32"))
    monkeypatch.setattr(watched_path, "_READ_BYTES", 10_000)
    beats = count_beats(monkeypatch)
    load_weights(str(tmp_path / "run"), chunks)
    size = sum(parameter.nbytes for parameter in chunks[0].parameters())
    assert len(beats) > size // 10_000
    assert any(bool(torch.any(parameter != 0)) for parameter in chunks[0].parameters())
