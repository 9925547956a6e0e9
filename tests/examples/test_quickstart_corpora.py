import io
import itertools
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sentencepiece
from PIL import Image, ImageDraw
from quickstart.corpora import (
    SHAPES,
    VOCAB_SIZE,
    CorpusOptions,
    Picture,
    ask,
    build_corpora,
    describe_scene,
    draw_view,
    read_pictures,
    train_tokenizer,
    write_sentence,
)

BACKGROUND = (240, 230, 220)


def make_picture(box: tuple[int, int, int, int], color: str = "blue") -> bytes:
    image = Image.new("RGB", (64, 64), BACKGROUND)
    ImageDraw.Draw(image).rectangle(box, fill=color)
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def show(color: str | None, shape: str | None, absent: tuple[str, ...] = ()) -> Picture:
    return Picture(0, b"", (), color, shape, absent)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of 12 training and 4 test pictures, every third of unknown shape."""
    for split, count in (("train", 12), ("test", 4)):
        folder = tmp_path / "package" / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        rows = []
        for number in range(count):
            (folder / "images" / f"{number}.png").write_bytes(make_picture((10, 20, 10 + number, 30)))
            rows.append(["what color is the shape?", "blue", number])
            rows.append(["is there a circle?", "no", number])
            if number % 3:
                rows.append(["what shape is present?", "rectangle", number])
        (folder / "questions.json").write_text(json.dumps(rows))
    return tmp_path / "package"


def build(package: Path, output: Path, **options: int) -> dict[str, int]:
    sizes = {"num_pictures": 12, "pairs_per_tar": 10, "documents_per_shard": 2, **options}
    return build_corpora(package, output, CorpusOptions(**sizes))


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("questions", "color", "shape"),
    [
        ([("what color is the circle?", "red")], "red", "circle"),
        ([("what is the teal shape?", "triangle")], "teal", "triangle"),
        ([("is there a red shape?", "yes"), ("is no circle present?", "no")], "red", "circle"),
        ([("is there a red shape?", "no"), ("does the image not contain a circle?", "yes")], None, None),
        ([("is there a circle?", "no"), ("is there not a triangle?", "yes")], None, "rectangle"),
    ],
)
def test_scene_follows_from_questions(questions: list[tuple[str, str]], color: str | None, shape: str | None) -> None:
    assert describe_scene(questions)[:2] == (color, shape)


def test_scene_lists_what_is_ruled_out() -> None:
    questions = [("is there a red shape?", "no"), ("is no circle present?", "yes")]
    assert describe_scene(questions)[2] == ("circle", "red")


@pytest.mark.parametrize(
    "questions",
    [
        [("what color is the shape?", "red"), ("is there a blue shape?", "yes")],
        [("what color is the shape?", "red"), ("is there a red shape?", "no")],
    ],
)
def test_contradicting_questions_are_refused(questions: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="contradict each other"):
        describe_scene(questions)


@pytest.mark.parametrize(
    ("color", "shape", "caption"),
    [
        ("red", "circle", "a red circle"),
        ("red", None, "a red shape"),
        (None, "circle", "a circle"),
        (None, None, None),
    ],
)
def test_caption_says_what_is_known(color: str | None, shape: str | None, caption: str | None) -> None:
    assert show(color, shape).caption == caption


def test_sentence_denies_only_what_is_absent() -> None:
    picture = show("red", "circle", ("blue", "triangle"))
    found = {write_sentence(picture, random.Random(number)) for number in range(50)}
    assert found == {
        "There is a red circle.",
        "There is a red circle, not a blue one.",
        "There is a red circle, not a triangle.",
    }


def test_view_zero_is_the_picture_itself() -> None:
    picture = make_picture((10, 20, 30, 40))
    assert draw_view(picture, 0, "seed") == picture


def test_views_move_the_shape_and_keep_every_pixel_of_it() -> None:
    picture = make_picture((10, 20, 30, 40))
    counts, corners = set(), set()
    for view in range(1, 20):
        pixels = np.asarray(Image.open(io.BytesIO(draw_view(picture, view, "seed"))))
        drawn = (pixels == (0, 0, 255)).all(axis=2)
        counts.add(int(drawn.sum()))
        corners.add(tuple(int(value) for value in np.argwhere(drawn)[0]))
        assert ((pixels == BACKGROUND).all(axis=2) | drawn).all()
    assert counts == {21 * 21}
    assert len(corners) > 10


def test_view_of_a_shape_cut_by_the_border_stays_there() -> None:
    picture = make_picture((0, 20, 30, 63))
    for view in range(1, 10):
        pixels = np.asarray(Image.open(io.BytesIO(draw_view(picture, view, "seed"))))
        rows, columns = np.nonzero((pixels == (0, 0, 255)).all(axis=2))
        assert (rows.min(), rows.max()) == (20, 63)
        assert columns.min() == 0 or columns.max() == 63


def test_corpus_is_the_same_bytes_every_time(package: Path, tmp_path: Path) -> None:
    build(package, tmp_path / "one")
    build(package, tmp_path / "two")
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")


def test_pairs_of_tar_and_parquet_agree(package: Path, tmp_path: Path) -> None:
    counts = build(package, tmp_path / "raw", pair_views=2)
    folder = tmp_path / "raw" / "coyo"
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    records, texts = [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            records += [json.load(tar.extractfile(name)) for name in names if name.endswith(".json")]
            texts += [tar.extractfile(name).read().decode() for name in names if name.endswith(".txt")]
            assert len({name.split(".")[0] for name in names}) * 3 == len(names)
    assert counts["pairs"] == len(rows) == 16  # the shape of four pictures is unknown
    assert {row["text"] for row in rows} == {"a rectangle"}
    assert [record["url"] for record in records] == [row["url"] for row in rows]
    assert texts == [row["text"] for row in rows]


def test_columns_that_need_another_model_are_null(package: Path, tmp_path: Path) -> None:
    build(package, tmp_path / "raw")
    rows = pq.read_table(tmp_path / "raw" / "coyo" / "part-00000.parquet").to_pylist()
    assert {row["clip_similarity_vitb32"] for row in rows} == {None}


def test_documents_have_two_to_six_pictures_each_before_its_sentence(package: Path, tmp_path: Path) -> None:
    build(package, tmp_path / "raw", document_views=3)
    folder = tmp_path / "raw" / "mmc4"
    lines = [line for path in sorted(folder.glob("docs_shard_*_v3.jsonl")) for line in path.read_text().splitlines()]
    documents = [json.loads(line) for line in lines]
    sizes = [len(document["image_info"]) for document in documents]
    assert sum(sizes) == 36
    assert max(sizes) <= 6
    assert sum(size < 2 for size in sizes) <= 3  # the last of each view takes what is left
    for document in documents:
        matched = [info["matched_text_index"] for info in document["image_info"]]
        assert matched == list(range(1, len(document["text_list"])))
        assert all((folder / "images" / info["image_name"]).exists() for info in document["image_info"])


def test_no_answer_of_a_conversation_follows_from_an_earlier_one(package: Path, tmp_path: Path) -> None:
    counts = build(package, tmp_path / "raw", conversation_views=2)
    folder = tmp_path / "raw" / "llava"
    records = json.loads((folder / "instructions.json").read_text())
    pictures = read_pictures(package / "easy_vqa" / "data" / "train", 12)
    assert counts["conversations"] == len(records) == len({record["id"] for record in records})
    for record in records:
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        asked = list(zip(turns[::2], turns[1::2], strict=True))
        _, number, _, conversation = record["id"].split("-")
        picture = pictures[int(number)]
        assert record["conversations"][0]["value"].startswith("<image>\n")
        assert (folder / record["image"]).exists()
        assert describe_scene([*picture.questions, *asked])  # true answers; a contradiction raises
        if conversation == "0":
            assert {*asked} <= {*picture.questions}
            known = [describe_scene(asked[:count]) for count in range(len(asked) + 1)]
            assert all(before != after for before, after in itertools.pairwise(known))
            assert known[-1][:2] == (picture.color, picture.shape)
        else:
            assert all(answer in ("yes", "no") for _, answer in asked)
            about = [any(shape in text for shape in SHAPES) for text, _ in asked]
            assert sorted(about) == [False] * bool(picture.color) + [True] * bool(picture.shape)


def test_yes_or_no_cannot_be_guessed_from_the_question() -> None:
    draw = random.Random(0)
    answers: dict[str, list[str]] = {}
    for _ in range(3000):
        text, answer = ask(draw.choice(SHAPES), SHAPES, draw)
        answers.setdefault(text, []).append(answer)
    assert len(answers) == 8 * len(SHAPES)
    # The fewest questions of one form are about 50, of which 25 +- 3.5 are answered by yes.
    assert all(0.25 < found.count("yes") / len(found) < 0.75 for found in answers.values())


def test_nothing_of_the_test_split_is_in_the_training_corpora(package: Path, tmp_path: Path) -> None:
    secret = package / "easy_vqa" / "data" / "test"
    for path in (secret / "images").iterdir():
        path.write_bytes(make_picture((5, 5, 50, 50), color="lime"))
    (secret / "questions.json").write_text(json.dumps([["is this a secret?", "lime", 0]]))
    build(package, tmp_path / "raw")
    for folder in ("coyo", "mmc4", "llava"):
        for content in read_folder(tmp_path / "raw" / folder).values():
            assert b"secret" not in content
            assert make_picture((5, 5, 50, 50), color="lime") not in content


def test_test_questions_are_spread_evenly_over_the_split(package: Path, tmp_path: Path) -> None:
    build(package, tmp_path / "raw", num_test_questions=5)
    records = json.loads((tmp_path / "raw" / "test.json").read_text())
    assert [record["question_id"] for record in records] == [0, 2, 4, 6, 8]
    assert all(Path(record["image"]).exists() for record in records)


def test_more_pictures_than_the_split_has_are_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="12 pictures with questions, 13 are wanted"):
        build(package, tmp_path / "raw", num_pictures=13)


def test_tokenizer_is_the_same_bytes_every_time_and_has_a_piece_for_each_word(tmp_path: Path) -> None:
    pictures = [
        Picture(
            0, b"", (("what shape is in the image?", shape), ("is there a gray shape?", "no")), color, shape, ("gray",)
        )
        for color in ("red", "blue", "yellow", "green", "black", "teal", "brown")
        for shape in ("circle", "triangle", "rectangle")
    ]
    for name in ("one", "two"):
        train_tokenizer(pictures, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one"))
    assert tokenizer.get_piece_size() == VOCAB_SIZE
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert len(tokenizer.encode("USER: is there a red triangle? ASSISTANT: no")) == 11
    assert tokenizer.decode(tokenizer.encode("two  spaces")) == "two  spaces"
    assert tokenizer.decode(tokenizer.encode("two\nlines, \u00e9")) == "two\nlines, \u00e9"
