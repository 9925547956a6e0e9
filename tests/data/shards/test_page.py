import base64
from html.parser import HTMLParser

import pytest

from megatron_vlm.config import DataError, UsageError
from megatron_vlm.data.documents import Image, Text
from megatron_vlm.data.samples import EncodedSample
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.shards.page import choose_samples, render_page
from megatron_vlm.data.shards.writer import write_dataset
from megatron_vlm.data.text.templates import TEMPLATES, Turn, encode_conversation
from megatron_vlm.data.text.tokenizer import load_tokenizer


class Page(HTMLParser):
    """Collects what the page shows: text by its class, and the bytes of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.shown: list[tuple[str, str | bytes]] = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "img":
            self.shown.append(("image", base64.b64decode(attributes["src"].partition("base64,")[2])))
        if tag == "span":
            self.stack.append(attributes["class"])

    def handle_endtag(self, tag):
        if tag == "span":
            self.stack.pop()

    def handle_data(self, data):
        if self.stack:
            self.shown.append((self.stack[-1], data))


@pytest.fixture
def dataset(folder, tokenizer, make_image):
    turns = [Turn((Image(make_image(), (48, 40)), Text("what is <b>?")), "a cat & dog")]
    segments = encode_conversation(turns, tokenizer, template=TEMPLATES["vicuna_v1"], system=None)
    write_dataset(folder, [EncodedSample(segments)] * 5, dataset_name="<tiny>", tokenizer=tokenizer.facts)
    return ShardedDataset.open(folder)


def test_page_shows_pictures_in_place_and_text_by_its_mask(dataset, tokenizer, make_image):
    page = Page()
    page.feed(render_page(dataset, tokenizer, [3]))
    merged: list[list] = []
    for kind, content in page.shown[3:]:  # after the legend
        if merged and merged[-1][0] == kind != "image":
            merged[-1][1] += content
        else:
            merged.append([kind, content])
    assert merged == [
        ["control", "<s>"],
        ["text context", " USER: "],
        ["image", make_image()],
        ["text context", "what is <b>? ASSISTANT:"],
        ["text trained", " a cat & dog"],
        ["control", "</s>"],
    ]


def test_page_names_source_index_and_counts_and_needs_no_other_file(dataset, tokenizer):
    text = render_page(dataset, tokenizer, [3])
    assert "&lt;tiny&gt; sample 3: 1 images" in text
    assert "<b>" not in text
    assert "http" not in text


def test_another_tokenizer_is_refused(dataset, tokenizer_path, tmp_path):
    (tmp_path / "other.model").write_bytes(tokenizer_path.read_bytes() + b"\x1a\x04\x18\x00\x20\x00")
    other = load_tokenizer(tmp_path / "other.model")
    with pytest.raises(DataError, match="prepared with tokenizer tiny.model"):
        render_page(dataset, other, [0])


def test_samples_are_chosen_by_name_order_or_chance():
    assert choose_samples(10, number=3, seed=None) == [0, 1, 2]
    assert choose_samples(10, number=3, seed=None, indices=[7, 2]) == [7, 2]
    assert choose_samples(2, number=3, seed=1) == [0, 1]
    assert choose_samples(10**6, number=5, seed=1) == choose_samples(10**6, number=5, seed=1)
    with pytest.raises(UsageError, match="sample 10 does not exist; fix: choose from 0 to 9"):
        choose_samples(10, number=3, seed=None, indices=[10])
