"""easy-vqa's training split as three raw corpora in the formats that a cluster downloads.

| folder | format | made of |
|---|---|---|
| `coyo/` | COYO parquet + the tars that img2dataset writes | a caption that a picture's questions imply |
| `mmc4/` | MMC4 `docs_shard_*_v3.jsonl` + `images/` | several pictures, each before its sentence |
| `llava/` | LLaVA `instructions.json` + `images/` | all questions of a picture in one conversation |

The test split becomes `test.json`, a list of questions for `evaluate`, and nothing else. Everything is a pure function
of the package's files and `CorpusOptions`: the same bytes every time. Columns that would need CLIP or another model are
null.
"""

import hashlib
import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vlm.config import DataError
from quickstart.pictures import draw_view
from quickstart.scenes import Question, Scene, describe_scene, read_questions

_PICTURE_SIZE = 64
_SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
_INTRODUCTIONS = (
    "Shapes on plain paper.",
    "A page from a picture book.",
    "What was drawn today:",
    "Some shapes and their colors.",
)
_COYO_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("id", "width", "height", "text_length", "word_count", "num_faces")]
    + [(name, pa.int64()) for name in ("num_tokens_bert", "num_tokens_gpt")]
    + [(name, pa.string()) for name in ("url", "text", "image_phash")]
    + [
        (name, pa.float64())
        for name in (
            "clip_similarity_vitb32",
            "clip_similarity_vitl14",
            "nsfw_score_opennsfw2",
            "nsfw_score_gantman",
            "watermark_score",
            "aesthetic_score_laion_v2",
        )
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusOptions:
    """How much is made of the 4,000 training pictures."""

    num_pictures: int = 4000
    """Training pictures used, from number 0."""
    num_test_questions: int | None = None
    """Test questions listed, evenly over the split; None: all 9,673."""
    pair_views: int = 4
    """Views of each picture among the pairs, the picture itself included."""
    document_views: int = 2
    """Views of each picture among the interleaved documents."""
    conversation_views: int = 4
    """Conversations of each picture, each with another view and order of the questions."""
    short_answer_suffix: bool = False
    """Whether questions end with LLaVA's request for a short answer."""
    pairs_per_tar: int = 4000
    documents_per_shard: int = 1000
    seed: int = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One training picture and what is known about it."""

    number: int
    encoded: bytes
    """PNG file."""
    questions: tuple[Question, ...]
    scene: Scene


def build_corpus(package: Path, output: Path, options: CorpusOptions) -> dict[str, int]:
    """Write the three raw corpora and the test questions.

    Args:
        package: unpacked easy-vqa wheel.
        output: folder for `coyo/`, `mmc4/`, `llava/` and `test.json`; they must not exist.
        options: sizes and seed.

    Returns:
        Number of pairs, documents, conversations and test_questions.

    Raises:
        DataError: the package does not hold what it should.
    """
    data = package / "easy_vqa" / "data"
    pictures = read_pictures(data / "train", options.num_pictures)
    return {
        "pairs": write_pairs(pictures, output / "coyo", options),
        "documents": write_documents(pictures, output / "mmc4", options),
        "conversations": write_conversations(pictures, output / "llava", options),
        "test_questions": write_test_questions(data / "test", output / "test.json", options.num_test_questions),
    }


def read_pictures(split: Path, count: int) -> list[Picture]:
    """Read the first `count` pictures of a split with their questions.

    Raises:
        DataError: the split has fewer pictures.
    """
    by_picture: dict[int, list[Question]] = defaultdict(list)
    for question in read_questions(split / "questions.json"):
        by_picture[question.picture].append(question)
    if count > len(by_picture):
        raise DataError(
            f"{len(by_picture)} pictures with questions, {count} wanted", where=str(split), fix="ask for fewer"
        )
    return [
        Picture(
            number=number,
            encoded=(split / "images" / f"{number}.png").read_bytes(),
            questions=tuple(by_picture[number]),
            scene=describe_scene(by_picture[number]),
        )
        for number in sorted(by_picture)[:count]
    ]


def write_caption(scene: Scene) -> str | None:
    """Return a short caption, or None for a scene of which nothing is known."""
    if scene.color is None and scene.shape is None:
        return None
    return " ".join(word for word in ("a", scene.color, scene.shape or "shape") if word)


def write_sentence(scene: Scene, draw: random.Random) -> str | None:
    """Return a sentence with the caption and, by the toss of a coin, one thing that is not there."""
    caption = write_caption(scene)
    if caption is None:
        return None
    if not scene.absent or draw.random() < 0.5:
        return f"There is {caption}."
    absent = draw.choice(scene.absent)
    return f"There is {caption}, not a {absent}{' one' if absent not in ('circle', 'rectangle', 'triangle') else ''}."


def write_pairs(pictures: list[Picture], folder: Path, options: CorpusOptions) -> int:
    """Write COYO-like pairs: one parquet and one tar (`key.png`, `key.txt`, `key.json`) per `pairs_per_tar`."""
    folder.mkdir(parents=True)
    pairs = [
        (picture, view, caption)
        for view in range(options.pair_views)
        for picture in pictures
        if (caption := write_caption(picture.scene)) is not None
    ]
    random.Random(f"{options.seed}/pairs").shuffle(pairs)
    for shard, start in enumerate(range(0, len(pairs), options.pairs_per_tar)):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for offset, (picture, view, caption) in enumerate(pairs[start : start + options.pairs_per_tar]):
                encoded = draw_view(picture.encoded, view, f"{options.seed}/pairs/{picture.number}")
                row = _pair_row(start + offset, picture.number, view, caption)
                _add_pair(tar, f"{shard:05d}{offset:04d}", row, encoded)
                rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows, schema=_COYO_SCHEMA), folder / f"part-{shard:05d}.parquet")
    return len(pairs)


def _pair_row(number: int, picture: int, view: int, caption: str) -> dict[str, Any]:
    return {
        "id": number,
        "url": f"https://example.org/easy-vqa/train/{picture}-{view}.png",
        "text": caption,
        "width": _PICTURE_SIZE,
        "height": _PICTURE_SIZE,
        "text_length": len(caption),
        "word_count": len(caption.split()),
        "num_faces": 0,
    }


def _add_pair(tar: tarfile.TarFile, key: str, row: dict[str, Any], encoded: bytes) -> None:
    record = {
        "caption": row["text"],
        "url": row["url"],
        "key": key,
        "status": "success",
        "error_message": None,
        "width": row["width"],
        "height": row["height"],
        "original_width": row["width"],
        "original_height": row["height"],
        "id": row["id"],
        "sha256": hashlib.sha256(encoded).hexdigest(),
    }
    members = {"png": encoded, "txt": row["text"].encode(), "json": json.dumps(record).encode()}
    for suffix, content in members.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def write_documents(pictures: list[Picture], folder: Path, options: CorpusOptions) -> int:
    """Write MMC4-like documents of 2 to 6 pictures, each picture before the sentence that it belongs to."""
    images = folder / "images"
    images.mkdir(parents=True)
    draw = random.Random(f"{options.seed}/documents")
    documents = []
    for members in _document_members(pictures, options.document_views, draw):
        texts, infos = [draw.choice(_INTRODUCTIONS)], []
        for picture, view in members:
            name = f"train-{picture.number}-{view}.png"
            (images / name).write_bytes(draw_view(picture.encoded, view, f"{options.seed}/documents/{picture.number}"))
            infos.append(_image_info(name, len(texts)))
            texts.append(write_sentence(picture.scene, draw))
        documents.append(_document(len(documents), texts, infos))
    for shard, start in enumerate(range(0, len(documents), options.documents_per_shard)):
        lines = [json.dumps(document) + "\n" for document in documents[start : start + options.documents_per_shard]]
        (folder / f"docs_shard_{shard}_v3.jsonl").write_text("".join(lines))
    return len(documents)


def _document_members(pictures: list[Picture], views: int, draw: random.Random) -> Iterator[list[tuple[Picture, int]]]:
    for view in range(views):
        shuffled = [picture for picture in pictures if write_caption(picture.scene) is not None]
        draw.shuffle(shuffled)
        position = 0
        while position < len(shuffled):
            count = draw.randint(2, 6)
            yield [(picture, view) for picture in shuffled[position : position + count]]
            position += count


def _image_info(name: str, sentence: int) -> dict[str, Any]:
    return {
        "image_name": name,
        "raw_url": f"https://example.org/easy-vqa/{name}",
        "matched_text_index": sentence,
        "matched_sim": None,
        "face_detections": None,
    }


def _document(number: int, texts: list[str], infos: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "url": f"https://example.org/easy-vqa/documents/{number}.html",
        "text_list": texts,
        "image_info": infos,
        "similarity_matrix": None,
        "could_have_url_duplicate": 0,
    }


def write_conversations(pictures: list[Picture], folder: Path, options: CorpusOptions) -> int:
    """Write LLaVA-like conversations: all questions of a picture in one, `<image>` before the first."""
    images = folder / "images"
    images.mkdir(parents=True)
    suffix = _SHORT_ANSWER if options.short_answer_suffix else ""
    records = []
    for view in range(options.conversation_views):
        for picture in pictures:
            draw = random.Random(f"{options.seed}/conversations/{picture.number}/{view}")
            name = f"train-{picture.number}-{view}.png"
            seed = f"{options.seed}/conversations/{picture.number}"
            (images / name).write_bytes(draw_view(picture.encoded, view, seed))
            questions = list(picture.questions)
            draw.shuffle(questions)
            turns = []
            for position, question in enumerate(questions):
                text = f"{question.text}{suffix}"
                turns.append({"from": "human", "value": text if position else f"<image>\n{text}"})
                turns.append({"from": "gpt", "value": question.answer})
            records.append({"id": f"train-{picture.number}-{view}", "image": f"images/{name}", "conversations": turns})
    (folder / "instructions.json").write_text(json.dumps(records))
    return len(records)


def write_test_questions(split: Path, path: Path, count: int | None) -> int:
    """Write the test split's questions, or `count` of them spread evenly, in the form that `evaluate` reads."""
    questions = read_questions(split / "questions.json")
    chosen: Sequence[int] = range(len(questions))
    if count is not None and count < len(questions):
        chosen = [position * len(questions) // count for position in range(count)]
    records = [
        {
            "question_id": position,
            "image": str((split / "images" / f"{questions[position].picture}.png").resolve()),
            "question": questions[position].text,
            "answers": [questions[position].answer],
        }
        for position in chosen
    ]
    path.write_text(json.dumps(records))
    return len(records)
