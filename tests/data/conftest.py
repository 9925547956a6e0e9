"""Tiny generated corpora and a tiny tokenizer; nothing is downloaded."""

import io
import json
import random
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image as PILImage

from megatron_vlm.data.files import remote
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment, TokenizerFacts
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer

_WORDS = (
    "a an the photo picture image of red green blue small large cat dog house tree with on under near and what is "
    "colour shape how many USER ASSISTANT: user question answer yes no round square sky water street one two three"
).split()


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A SentencePiece model with Llama's settings: BPE, byte fallback, BOS 1, EOS 2, no whitespace removed."""
    generator = random.Random(0)
    lines = [" ".join(generator.choices(_WORDS, k=12)) for _ in range(200)]
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        num_threads=1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def tokenizer_facts() -> TokenizerFacts:
    return TokenizerFacts(name="tiny", sha256="ab" * 32, vocab_size=512, bos_id=1, eos_id=2)


@pytest.fixture(scope="session")
def make_image():
    """Encode a small picture: make_image(width, height, "JPEG", seed=0)."""

    def make(
        width: int = 48, height: int = 40, file_format: str = "JPEG", *, seed: int = 0, mode: str = "RGB"
    ) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        picture = PILImage.fromarray(pixels).resize((width, height)).convert(mode)
        stream = io.BytesIO()
        picture.save(stream, format=file_format)
        return stream.getvalue()

    return make


@pytest.fixture(scope="session")
def make_samples(make_image):
    """Random samples: make_samples(count, seed=0)."""

    def make(count: int, *, seed: int = 0) -> list[EncodedSample]:
        generator = np.random.default_rng(seed)
        samples = []
        for number in range(count):
            segments: list[TextSegment | ImageSegment] = [TextSegment(np.array([1], dtype=np.int32), False)]
            for _ in range(generator.integers(0, 4)):
                segments.append(ImageSegment(make_image(seed=number), (48, 40)))
                ids = generator.integers(3, 512, generator.integers(1, 20)).astype(np.int32)
                segments.append(TextSegment(ids, bool(generator.integers(0, 2))))
            samples.append(EncodedSample(tuple(segments)))
        return samples

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dataset"


@pytest.fixture(scope="session")
def make_tar():
    """Write a tar: make_tar(path, [(name, content), ...], format=tarfile.GNU_FORMAT)."""

    def make(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
        with tarfile.open(path, "w", **options) as archive:
            for name, content in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return path

    return make


@pytest.fixture(scope="session")
def make_lines():
    """Write JSON lines; bytes are taken as they are."""

    def make(path: Path, records: list) -> Path:
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return make


@pytest.fixture(scope="session")
def make_table():
    """Write a parquet file from columns."""

    def make(path: Path, columns: dict, **options) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
        return path

    return make


@pytest.fixture
def mmc4(tmp_path, make_lines, make_image) -> Path:
    """Two files of three documents with 1 to 3 images each, and their image folder."""
    root = tmp_path / "mmc4"
    (root / "images").mkdir(parents=True)
    for shard in range(2):
        records = []
        for number in range(3):
            infos = []
            for image in range(number + 1):
                name = f"{shard}{number}{image}.jpg"
                (root / "images" / name).write_bytes(make_image(seed=100 * shard + 10 * number + image))
                info = {"image_name": name, "raw_url": f"http://x/{name}", "matched_text_index": image}
                infos.append(info | {"matched_sim": 0.2 + 0.1 * image})
            text = [f"the red cat {number}", "a blue dog", "green trees", "the sky"]
            records.append({"url": f"http://x/{shard}/{number}", "text_list": text, "image_info": infos})
        make_lines(root / f"docs_shard_{shard}_v3.jsonl", records)
    return root


@pytest.fixture
def coyo(tmp_path, make_tar, make_image, make_table) -> Path:
    """Two tars of img2dataset with four pairs each, and one COYO parquet with all eight rows and one more."""
    root = tmp_path / "coyo"
    root.mkdir()
    rows = []
    for shard in range(2):
        members = []
        for number in range(4):
            key, url = f"{shard:05d}{number:04d}", f"http://x/{shard}{number}.jpg"
            caption = f"a red cat {shard} {number}"
            rows.append((url, caption))
            record = {"key": key, "url": url, "caption": caption, "status": "success"}
            members += [
                (f"{key}.jpg", make_image(seed=shard * 10 + number)),
                (f"{key}.txt", caption.encode()),
                (f"{key}.json", json.dumps(record).encode()),
            ]
        make_tar(root / f"{shard:05d}.tar", members)
    rows.append(("http://x/gone.jpg", "an image that is gone"))
    urls, captions = zip(*rows, strict=True)
    make_table(root / "part-00000.parquet", {"url": list(urls), "text": list(captions)})
    return root


@pytest.fixture
def bucket(monkeypatch):
    """An empty object store in this process: bucket.pipe(path, content)."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(remote, "_WAIT_SECONDS", (0.0, 0.0, 0.0))
    return fsspec.filesystem("memory")
