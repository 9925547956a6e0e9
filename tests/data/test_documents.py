import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config.prepare import JoinRules, TextRules
from megatron_vlm.data.documents import VARIANTS, Document, Image, Text, clean_text, join_text
from megatron_vlm.data.rejects import RejectError

I1, I2 = Image(b"1"), Image(b"2")


def document(*segments) -> Document:
    return Document(tuple(Text(s) if isinstance(s, str) else s for s in segments), key="k")


def plain(doc: Document) -> list:
    return [s.text if isinstance(s, Text) else s for s in doc.segments]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (("a", I1, "b", "c"), ["a", I1, "b c"]),
        ((I1, "a", "b", I2, "c"), [I1, "a b", I2, "c"]),
        ((I1, I2, "a"), [I1, I2, "a"]),
        (("a ", I1, " b"), ["a ", I1, "b"]),
        (("a", I1, "", "b"), ["a", I1, "b"]),
        (("a", "", "b"), ["a  b"]),
        (("a", I1), ["a", I1]),
        ((I1,), [I1]),
    ],
)
def test_sentences_join_with_one_blank_and_none_beside_an_image(segments, expected):
    assert plain(join_text(document(*segments), JoinRules())) == expected


SENTENCES = st.lists(st.text(alphabet="ab ", max_size=4), min_size=1, max_size=6)


@given(sentences=SENTENCES, matches=st.lists(st.integers(0, 5), max_size=4))
def test_joining_equals_the_string_operations_of_the_paper_code(sentences, matches):
    matches = sorted(m % len(sentences) for m in matches)
    strings = list(sentences)
    segments: list = []
    for number, sentence in enumerate(sentences):
        count = matches.count(number)
        strings[number] = "<image>" * count + sentence
        segments += [I1] * count + [sentence]
    expected = " ".join(strings).replace("<image> ", "<image>").replace(" <image>", "<image>").split("<image>")
    joined = plain(join_text(document(*segments), JoinRules()))
    chunks = [""]
    for segment in joined:
        if segment == I1:
            chunks.append("")
        else:
            chunks[-1] += segment
    assert chunks == expected


def test_join_rules_can_be_turned_off():
    rules = JoinRules(separator="\n", keep_blanks=True)
    assert plain(join_text(document("a", I1, "b", "c"), rules)) == ["a\n", I1, "b\nc"]


STORY = document("t1", I1, "t2", "t3", I2, "t4")


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("full", [["t1", I1, "t2", "t3", I2, "t4"]]),
        ("pairs", [[I1, "t2"], [I2, "t4"]]),
        ("images-first", [[I1, I2, "t1", "t2", "t3", "t4"]]),
        ("text-only", [["t1", "t2", "t3", "t4"]]),
    ],
)
def test_variants_of_the_ablations(variant, expected):
    assert [plain(doc) for doc in VARIANTS[variant](STORY)] == expected


def test_stacked_images_each_pair_with_their_sentence():
    assert [plain(doc) for doc in VARIANTS["pairs"](document(I1, I2, "a", "b"))] == [[I1, "a"], [I2, "a"]]


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_sentence_costs_its_own_pair_alone(blank):
    assert [plain(doc) for doc in VARIANTS["pairs"](document(I1, blank, I2, "b"))] == [[I2, "b"]]


def test_images_without_text_give_no_pair_and_no_text_only_document():
    assert VARIANTS["pairs"](document("a", I1)) == ()
    assert VARIANTS["text-only"](document(I1)) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\x00b", "control_character"),
        ("日\x1b[0m", "control_character"),
        ("a\x7f", "control_character"),
        ("a\ud800", "invalid_unicode"),
        ("x" * 101, "text_too_long"),
    ],
)
def test_bad_text_is_rejected(text, reason):
    with pytest.raises(RejectError, match=reason):
        clean_text(text, TextRules(max_characters=100))


@pytest.mark.parametrize("text", ["", "plain", "tab\tline\r\nbreak", "日本 é 😀", "\u0085"])
def test_other_text_is_taken(text):
    assert clean_text(text, TextRules()) == text


def test_literal_placeholders_are_written_in_capitals_unless_kept():
    assert clean_text("an <image> tag", TextRules()) == "an <IMAGE> tag"
    assert clean_text("an <image> tag", TextRules(keep_placeholders=True)) == "an <image> tag"


def test_control_characters_are_taken_on_request():
    assert clean_text("a\x0cb", TextRules(control_characters=True)) == "a\x0cb"


def test_a_reject_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(RejectError("image_empty", "0 bytes")))
    assert (error.reason, error.detail, str(error)) == ("image_empty", "0 bytes", "image_empty: 0 bytes")


def test_texts_of_different_masks_stay_apart_and_no_blank_is_lost_or_doubled():
    image = Image(b"")
    given = (Text("q", False), Text("one"), Text("two"), image, Text("a ", True), Text("b", False), Text("c", False))
    joined = join_text(Document(given), JoinRules())
    assert joined.segments == (Text("q", False), Text(" one two"), image, Text("a "), Text("b c", False))
