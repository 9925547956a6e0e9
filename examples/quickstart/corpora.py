"""Download easy-vqa, write it as three raw corpora in the formats of the large corpora, and train a tokenizer on them.

    python -m quickstart.corpora OUTPUT [--smoke]

- `raw/coyo/`: COYO parquet and the tars that img2dataset writes, with captions that name only the shape
- `raw/mmc4/`: MMC4 `docs_shard_*_v3.jsonl` and `images/`, documents of several pictures, each before its sentence
- `raw/llava/`: LLaVA `instructions.json` and `images/`, conversations about one picture
- `raw/test.json`: the questions of the test split for `evaluate`; nothing else uses that split
- `tokenizer.model`: a SentencePiece model with the few words of these corpora

Shapes and colors follow from the questions. The corpora depend only on the options and on a package pinned by sha256:
the same bytes every time. Columns that would need CLIP or another model are null.
"""

import argparse
import functools
import hashlib
import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece
from PIL import Image
from wheels import fetch

DOWNLOADS = Path("runs/quickstart/downloads")
PACKAGES = {  # wheels by name and version, with their sha256
    # 5,000 pictures of 64 x 64 pixels and 48,248 questions with a published split into training and test (MIT).
    "easy_vqa-1.0": "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
}
VOCAB_SIZE = 512  # 3 special tokens, 256 bytes, and the words of the questions and their letters
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_INTRODUCTIONS = """\
Shapes on plain paper.
A page from a picture book.
What was drawn today:
Some shapes and their colors.""".splitlines()
_PLAIN = "is there a {}?/is there a {} in the image?/is a {} present?/does the image contain a {}?".split("/")
_NEGATED = (
    "is there not a {}?/is there not a {} in the image?/is no {} present?/does the image not contain a {}?".split("/")
)
_ROLES = ("human", "gpt")
_INTEGERS = "id width height text_length word_count num_faces num_tokens_bert num_tokens_gpt".split()
_FLOATS = "clip_similarity_vitb32 clip_similarity_vitl14 nsfw_score_opennsfw2 nsfw_score_gantman".split()
_COYO_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in _INTEGERS]
    + [(name, pa.string()) for name in ("url", "text", "image_phash")]
    + [(name, pa.float64()) for name in (*_FLOATS, "watermark_score", "aesthetic_score_laion_v2")]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusOptions:
    """How much is made from the training pictures. Views are the picture itself and variants drawn from it."""

    num_pictures: int = 4000
    num_test_questions: int | None = None  # spread evenly over the split; None: all 9,673
    pair_views: int = 4
    document_views: int = 2
    conversation_views: int = 3
    pairs_per_tar: int = 4000
    documents_per_shard: int = 1000
    seed: int = 1234


SMOKE = CorpusOptions(num_pictures=400, num_test_questions=100, pair_views=1, document_views=1, conversation_views=1)


@dataclass(frozen=True, slots=True)
class Picture:
    """A training picture, its questions, and what they imply about its single shape."""

    number: int
    encoded: bytes  # PNG file
    questions: tuple[tuple[str, str], ...]  # texts and answers
    color: str | None
    shape: str | None
    absent: tuple[str, ...]  # colors and shapes that a question rules out, in alphabetical order

    @property
    def caption(self) -> str | None:
        """A short caption; None if nothing is known about the picture."""
        if self.color is None and self.shape is None:
            return None
        return " ".join(word for word in ("a", self.color, self.shape or "shape") if word)


def read_questions(split: Path) -> list[tuple[str, str, int]]:
    """Return text, answer and picture number of each question of a split."""
    return [(text, answer, picture) for text, answer, picture in json.loads((split / "questions.json").read_text())]


def read_pictures(split: Path, count: int) -> list[Picture]:
    """Read the first `count` pictures of a split with their questions."""
    by_picture: dict[int, list[tuple[str, str]]] = {}
    for text, answer, picture in read_questions(split):
        by_picture.setdefault(picture, []).append((text, answer))
    if count > len(by_picture):
        raise ValueError(f"{split} has {len(by_picture)} pictures with questions, {count} are wanted")
    return [
        Picture(number, (split / "images" / f"{number}.png").read_bytes(), tuple(questions), *describe_scene(questions))
        for number, questions in sorted(by_picture.items())[:count]
    ]


def describe_scene(questions: Iterable[tuple[str, str]]) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the color and shape of a picture and the values ruled out, as far as its questions and answers tell.

    A question about one property states the other ("what color is the circle?"); a yes/no question confirms or rules
    out what it names; a property is also known once all its other values are ruled out.
    """
    present, absent = set[str](), set[str]()
    for text, answer in questions:
        named = {word for word in (*re.findall(r"[a-z]+", text), answer) if word in COLORS or word in SHAPES}
        denied = answer == ("yes" if {"no", "not"} & {*text.split()} else "no")
        (absent if denied else present).update(named)
    color, shape = (_conclude(values, present, absent) for values in (COLORS, SHAPES))
    return color, shape, tuple(sorted(absent))


def _conclude(values: tuple[str, ...], present: set[str], absent: set[str]) -> str | None:
    known = present & set(values)
    left = [value for value in values if value not in absent]
    if len(known) > 1 or not left or known & absent:
        raise ValueError(f"questions contradict each other: {sorted(present)} present, {sorted(absent)} absent")
    return known.pop() if known else left[0] if len(left) == 1 else None


def draw_view(encoded: bytes, view: int, seed: str) -> bytes:
    """Return a view of a picture as PNG; view 0 is the picture itself, byte for byte.

    In every other view the shape is moved to a random place on its plain background and, half the time, mirrored. What
    the questions say (color and shape, never left or right) stays true. A shape cut by the border stays at the border.
    """
    if view == 0:
        return encoded
    draw = random.Random(f"{seed}/{view}")
    pixels, background = _decode(encoded)
    pixels = pixels[:, :: -1 if draw.random() < 0.5 else 1]
    drawn = (pixels != background).any(axis=2)
    moved = np.full_like(pixels, background)
    rows, new_rows = _place(drawn.any(axis=1), draw)
    columns, new_columns = _place(drawn.any(axis=0), draw)
    moved[new_rows, new_columns] = pixels[rows, columns]
    out = io.BytesIO()
    Image.fromarray(moved).save(out, format="PNG", compress_level=1)
    return out.getvalue()


@functools.lru_cache(maxsize=4096)
def _decode(encoded: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return uint8[height, width, 3] and the most frequent color."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(image), max(image.getcolors(image.width * image.height), key=lambda found: found)[1]


def _place(occupied: np.ndarray, draw: random.Random) -> tuple[slice, slice]:
    """Return the occupied range along one axis and the range to move it to."""
    size, found = len(occupied), np.flatnonzero(occupied)
    start, stop = (int(found[0]), int(found[-1]) + 1) if found.size else (0, size)
    moved = start if start == 0 or stop == size else draw.randint(1, size - stop + start - 1)
    return slice(start, stop), slice(moved, moved + stop - start)


def write_pairs(pictures: list[Picture], folder: Path, options: CorpusOptions) -> int:
    """Write COYO-like pairs: parquet files, each with a tar of `key.png`, `key.txt` and `key.json`.

    The captions name shapes only: a tower learns colors in a hundred iterations, and is then slow to learn shapes.
    """
    folder.mkdir(parents=True)
    pairs = [(picture, view) for view in range(options.pair_views) for picture in pictures if picture.shape]
    random.Random(f"{options.seed}/pairs").shuffle(pairs)
    for shard, start in enumerate(range(0, len(pairs), options.pairs_per_tar)):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for offset, (picture, view) in enumerate(pairs[start : start + options.pairs_per_tar]):
                encoded = draw_view(picture.encoded, view, f"{options.seed}/pairs/{picture.number}")
                rows.append(_pair_row(start + offset, picture, view))
                _add_pair(tar, f"{shard:05d}{offset:04d}", rows[-1], encoded)
        pq.write_table(pa.Table.from_pylist(rows, schema=_COYO_SCHEMA), folder / f"part-{shard:05d}.parquet")
    return len(pairs)


def _pair_row(number: int, picture: Picture, view: int) -> dict[str, Any]:
    caption, url = f"a {picture.shape}", f"https://example.org/easy-vqa/train/{picture.number}-{view}.png"
    sizes = {"width": 64, "height": 64, "text_length": len(caption), "word_count": len(caption.split())}
    return {"id": number, "url": url, "text": caption, **sizes, "num_faces": 0}


def _add_pair(tar: tarfile.TarFile, key: str, row: dict[str, Any], encoded: bytes) -> None:
    record = {"caption": row["text"], "url": row["url"], "key": key, "status": "success", "error_message": None}
    record |= {"width": 64, "height": 64, "original_width": 64, "original_height": 64}
    record |= {"id": row["id"], "sha256": hashlib.sha256(encoded).hexdigest()}
    for suffix, content in (("png", encoded), ("txt", row["text"].encode()), ("json", json.dumps(record).encode())):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def write_documents(pictures: list[Picture], folder: Path, options: CorpusOptions) -> int:
    """Write MMC4-like documents of 2 to 6 pictures, each before its sentence."""
    (folder / "images").mkdir(parents=True)
    draw = random.Random(f"{options.seed}/documents")
    documents: list[dict[str, Any]] = []
    for members in _document_members(pictures, options.document_views, draw):
        texts, infos = [draw.choice(_INTRODUCTIONS)], []
        for picture, view in members:
            name = f"train-{picture.number}-{view}.png"
            encoded = draw_view(picture.encoded, view, f"{options.seed}/documents/{picture.number}")
            (folder / "images" / name).write_bytes(encoded)
            info = {"image_name": name, "raw_url": f"https://example.org/easy-vqa/{name}"}
            infos.append(info | {"matched_text_index": len(texts), "matched_sim": None, "face_detections": None})
            texts.append(write_sentence(picture, draw))
        url = f"https://example.org/easy-vqa/documents/{len(documents)}.html"
        document = {"url": url, "text_list": texts, "image_info": infos, "similarity_matrix": None}
        documents.append(document | {"could_have_url_duplicate": 0})
    for shard, start in enumerate(range(0, len(documents), options.documents_per_shard)):
        lines = [json.dumps(document) + "\n" for document in documents[start : start + options.documents_per_shard]]
        (folder / f"docs_shard_{shard}_v3.jsonl").write_text("".join(lines))
    return len(documents)


def _document_members(pictures: list[Picture], views: int, draw: random.Random) -> Iterator[list[tuple[Picture, int]]]:
    for view in range(views):
        shuffled = [picture for picture in pictures if picture.caption]
        draw.shuffle(shuffled)
        while shuffled:
            count = draw.randint(2, 6)
            yield [(picture, view) for picture in shuffled[:count]]
            shuffled = shuffled[count:]


def write_sentence(picture: Picture, draw: random.Random) -> str:
    """Return a sentence with the caption and, half the time, one thing that is not in the picture."""
    if not picture.absent or draw.random() < 0.5:
        return f"There is {picture.caption}."
    absent = draw.choice(picture.absent)
    return f"There is {picture.caption}, not a {absent}{' one' if absent in COLORS else ''}."


def write_conversations(pictures: list[Picture], folder: Path, options: CorpusOptions) -> int:
    """Write LLaVA-like conversations: published questions that earlier ones do not answer, and those of `ask`."""
    (folder / "images").mkdir(parents=True)
    records = []
    for view in range(options.conversation_views):
        for picture in pictures:
            name, seed = f"train-{picture.number}-{view}", f"{options.seed}/conversations/{picture.number}"
            (folder / "images" / f"{name}.png").write_bytes(draw_view(picture.encoded, view, seed))
            draw, published = random.Random(f"{seed}/{view}"), list[tuple[str, str]]()
            for question in draw.sample(picture.questions, len(picture.questions)):
                published += [] if _follows(published, *question) else [question]
            conversations = [published]
            known = [(one, values) for one, values in ((picture.shape, SHAPES), (picture.color, COLORS)) if one]
            for _ in range(5 if known else 0):  # two questions, of which neither answers the other
                conversations.append([ask(*one, draw) for one in draw.sample(known, len(known))])
            for number, asked in enumerate(conversations):
                turns = [{"from": role, "value": text} for one in asked for role, text in zip(_ROLES, one, strict=True)]
                turns[0]["value"] = f"<image>\n{turns[0]['value']}"
                records.append({"id": f"{name}-{number}", "image": f"images/{name}.png", "conversations": turns})
    (folder / "instructions.json").write_text(json.dumps(records))
    return len(records)


def _follows(asked: list[tuple[str, str]], text: str, answer: str) -> bool:
    """Return whether the questions asked before, with their answers, give this answer."""
    color, shape, absent = describe_scene(asked)
    named = {*re.findall(r"[a-z]+", text), answer} if answer in ("yes", "no") else {answer}
    return any(word in absent or (word in COLORS and color) or (word in SHAPES and shape) for word in named)


def ask(shown: str, values: tuple[str, ...], draw: random.Random) -> tuple[str, str]:
    """Return a yes/no question and its answer: half of them name what is shown, and one in five is negated."""
    value = shown if draw.random() < 0.5 else draw.choice([other for other in values if other != shown])
    negated = draw.random() < 0.2
    text = draw.choice(_NEGATED if negated else _PLAIN).format(f"{value} shape" if value in COLORS else value)
    return text, "yes" if (value == shown) != negated else "no"


def write_test_questions(split: Path, path: Path, count: int | None) -> int:
    """Write the questions of the test split, or `count` of them evenly spread, in the format of `evaluate`."""
    questions = read_questions(split)
    count = min(count or len(questions), len(questions))
    records = []
    for position in (number * len(questions) // count for number in range(count)):
        text, answer, picture = questions[position]
        image = str((split / "images" / f"{picture}.png").resolve())
        records.append({"question_id": position, "image": image, "question": text, "answers": [answer]})
    path.write_text(json.dumps(records))
    return count


def train_tokenizer(pictures: list[Picture], path: Path) -> None:
    """Train a SentencePiece model like Llama's, but of few pieces, on what is asked and said about the pictures."""
    draw = random.Random(0)
    lines = {f"USER: {text} ASSISTANT: {answer}" for picture in pictures for text, answer in picture.questions}
    lines |= {write_sentence(picture, draw) for picture in pictures if picture.caption} | {*_INTRODUCTIONS}
    options = {"model_type": "bpe", "byte_fallback": True, "num_threads": 1, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": VOCAB_SIZE}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sorted(lines)), model_writer=file, **options)


def build_corpora(package: Path, raw: Path, options: CorpusOptions) -> dict[str, int]:
    """Write the three raw corpora and the test questions into an empty folder and return their sizes."""
    data = package / "easy_vqa" / "data"
    pictures = read_pictures(data / "train", options.num_pictures)
    return {
        "pairs": write_pairs(pictures, raw / "coyo", options),
        "documents": write_documents(pictures, raw / "mmc4", options),
        "conversations": write_conversations(pictures, raw / "llava", options),
        "test questions": write_test_questions(data / "test", raw / "test.json", options.num_test_questions),
    }


def main() -> None:
    """Download and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tenth of the pictures, one view of each")
    args = parser.parse_args()
    options = SMOKE if args.smoke else CorpusOptions()
    (easy_vqa,) = (fetch(package, sha256, DOWNLOADS) for package, sha256 in PACKAGES.items())
    shutil.rmtree(args.output / "raw", ignore_errors=True)
    counts = build_corpora(easy_vqa, args.output / "raw", options)
    pictures = read_pictures(easy_vqa / "easy_vqa" / "data" / "train", options.num_pictures)
    train_tokenizer(pictures, args.output / "tokenizer.model")
    print("wrote " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
