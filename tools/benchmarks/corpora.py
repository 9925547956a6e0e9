"""Raw corpora for the benchmarks: photo-like JPEG files, English text, and the formats of COYO and MMC4."""

import io
import json
import pydoc_data.topics
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

_NUM_PICTURES = 32
STORED_SHAPES = ((448, 336), (336, 448), (504, 336), (336, 336))  # the paper's tooling makes the shorter side 336
_MAX_PIECES = 8000


def make_jpeg(width: int, height: int, rng: np.random.Generator, *, quality: int = 85) -> bytes:
    """Return a JPEG file about as large as a photo: smooth shapes with noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    noisy = Image.fromarray(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8))
    stream = io.BytesIO()
    noisy.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


class Corpus:
    """English text (from Python's own documentation) and pictures to draw from."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.text = re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values()))
        self._words = self.text.split(" ")
        self._sentences = [f"{sentence}." for sentence in self.text.split(". ") if 20 < len(sentence) < 400]
        self._pictures = [
            make_jpeg(*STORED_SHAPES[number % len(STORED_SHAPES)], self.rng, quality=75)
            for number in range(_NUM_PICTURES)
        ]

    def train_tokenizer(self, folder: Path) -> Path:
        """Train a SentencePiece model like Llama's on the text and return its file."""
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(self._sentences),
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=_MAX_PIECES,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        return folder / "tokenizer.model"

    def captions(self, number: int) -> Iterator[str]:
        """Yield captions of 5 to 29 words."""
        for length in self.rng.integers(5, 30, number).tolist():
            first = int(self.rng.integers(len(self._words) - length))
            yield " ".join(self._words[first : first + length])

    def write_pairs(self, file: Path, number: int) -> None:
        """Write a tar like img2dataset's: .jpg, .txt and .json for each pair."""
        with tarfile.open(file, "w") as tar:
            for index, caption in enumerate(self.captions(number)):
                key = f"{index:09d}"
                record = {"url": f"https://example.org/{key}.jpg", "key": key, "caption": caption, "status": "success"}
                for extension, content in (
                    ("jpg", self._pictures[index % _NUM_PICTURES]),
                    ("txt", caption.encode()),
                    ("json", json.dumps(record).encode()),
                ):
                    header = tarfile.TarInfo(f"{key}.{extension}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))

    def write_documents(self, folder: Path, number: int) -> None:
        """Write an MMC4 shard with 1 to 6 images per document and four sentences per image, and the image files."""
        (folder / "images").mkdir(parents=True)
        num_files = 0
        with (folder / "docs_shard_0_v3.jsonl").open("w") as stream:
            for index in range(number):
                num_images = int(np.clip(self.rng.poisson(4), 1, 6))
                chosen = self.rng.integers(len(self._sentences), size=4 * num_images).tolist()
                infos = []
                for place in self.rng.integers(len(chosen), size=num_images).tolist():
                    name = f"{num_files:08d}.jpg"
                    (folder / "images" / name).write_bytes(self._pictures[num_files % _NUM_PICTURES])
                    infos.append({"image_name": name, "matched_text_index": place, "matched_sim": 0.25})
                    num_files += 1
                sentences = [self._sentences[sentence] for sentence in chosen]
                matrix = self.rng.random((num_images, len(chosen))).round(6).tolist()
                record = {"url": f"https://example.org/{index}", "text_list": sentences, "image_info": infos}
                stream.write(json.dumps(record | {"similarity_matrix": matrix}) + "\n")
