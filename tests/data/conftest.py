"""Tiny generated corpora and a tiny tokenizer; nothing is downloaded."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image as PILImage

from megatron_vlm.data.manifest import TokenizerFacts
from megatron_vlm.data.shards import EncodedSample, ImageSegment, TextSegment
from megatron_vlm.data.tokenizer import Tokenizer, load_tokenizer

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
                segments.append(ImageSegment(make_image(seed=number)))
                ids = generator.integers(3, 512, generator.integers(1, 20)).astype(np.int32)
                segments.append(TextSegment(ids, bool(generator.integers(0, 2))))
            samples.append(EncodedSample(tuple(segments)))
        return samples

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dataset"
