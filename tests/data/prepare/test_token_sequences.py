"""What training sees of one document, token by token, written out by hand.

The tokenizer has one piece for each character, so that a sequence of tokens can be read. `▁` is a blank, or the mark
that Llama's tokenizer puts before a text of its own; a line break is a byte, as in Llama's vocabulary. Sources: VILA
and LLaVA, llava/conversation.py and llava/data/dataset.py; ChatML and Llama 3 as the models of these names have them.
"""

import base64
import json
import re
import string
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image as PILImage

from megatron_vlm.cli.main import main
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.shards.dataset import ShardedDataset
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer

CONTEXT, TRAINED, IMAGE = "context", "trained", "image"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CONTROL = ("<s>", "</s>", *SPECIAL)
_PIECE = re.compile(r"</?s>|<0x[0-9A-F]{2}>|" + "|".join(map(re.escape, SPECIAL)) + "|.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tokenizer, and pictures 0.png to 6.png."""
    root = tmp_path_factory.mktemp("sequences")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([string.punctuation + string.ascii_letters + string.digits] * 3),
        model_prefix=str(root / "characters"),
        model_type="char",
        vocab_size=1000,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(SPECIAL),
        minloglevel=2,
    )
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(root / f"{number}.png")
    return root


def tokens_of(dataset: ShardedDataset, index: int, folder: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return every token of a sample by name, with whether it is a target; pictures by number."""
    pictures = {(folder / f"{number}.png").read_bytes(): str(number) for number in range(7)}
    found: list[tuple[str, str]] = []
    for segment in dataset[index].segments:
        if isinstance(segment, ImageSegment):
            found.append((IMAGE, pictures[segment.encoded]))
        else:
            mask = TRAINED if segment.train else CONTEXT
            found += [(mask, tokenizer.piece(token)) for token in segment.input_ids]
    # The first token of a sample follows nothing, so it is never a target, whatever its segment says.
    return [(CONTEXT, found[0][1]), *found[1:]]


def expand(sequence: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Write out runs of tokens one by one."""
    return [(mask, piece) for mask, run in sequence for piece in ([run] if mask == IMAGE else _PIECE.findall(run))]


def prepare(folder: Path, kind: str, record: dict, output: Path, *options: str) -> ShardedDataset:
    """Write shards of one record as the command line does."""
    source = output.with_suffix(".jsonl")
    source.write_text(json.dumps(record) + "\n")
    tokenizer = str(folder / "characters.model")
    command = ["prepare", kind, "--input", str(source), "--images", str(folder), "--output", str(output)]
    assert main([*command, "--tokenizer", tokenizer, "--workers", "1", *options]) == 0
    return ShardedDataset.open(output)


def sequences(folder: Path, dataset: ShardedDataset) -> list[list[tuple[str, str]]]:
    tokenizer = load_tokenizer(folder / "characters.model")
    return [tokens_of(dataset, index, folder, tokenizer) for index in range(len(dataset))]


# --------------------------------------------------------------------------------------------------- templates

CONVERSATION = {
    "image": ["0.png", "1.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat"},
        {"from": "human", "value": "And <image>?"},
        {"from": "gpt", "value": "Red"},
    ],
}
_LLAVA_SYSTEM = (
    "You▁are▁a▁helpful▁language▁and▁vision▁assistant.▁You▁are▁able▁to▁understand▁the▁visual▁content▁that▁the▁user▁"
    "provides,▁and▁assist▁the▁user▁with▁a▁variety▁of▁tasks▁using▁natural▁language."
)
_USER_3 = "<|start_header_id|>user<|end_header_id|><0x0A><0x0A>"
_ASSISTANT_3 = "<|start_header_id|>assistant<|end_header_id|><0x0A><0x0A>"

TEMPLATES = {
    "vicuna_v1": [
        (
            CONTEXT,
            "<s>▁A▁chat▁between▁a▁curious▁user▁and▁an▁artificial▁intelligence▁assistant.▁The▁assistant▁gives▁helpful,▁"
            "detailed,▁and▁polite▁answers▁to▁the▁user's▁questions.▁USER:▁",
        ),
        (IMAGE, "0"),
        (CONTEXT, "▁<0x0A>What?▁ASSISTANT:"),
        (TRAINED, "▁A▁cat</s>"),
        (CONTEXT, "USER:▁And▁"),
        (IMAGE, "1"),
        (CONTEXT, "▁?▁ASSISTANT:"),
        (TRAINED, "▁Red</s>"),
    ],
    "plain": [
        (CONTEXT, "<s>"),
        (IMAGE, "0"),
        (TRAINED, "▁A▁cat<0x0A>"),
        (IMAGE, "1"),
        (TRAINED, "▁Red<0x0A>"),
    ],
    "llama_2": [
        (CONTEXT, f"<s>▁[INST]▁<<SYS>><0x0A>{_LLAVA_SYSTEM}<0x0A><</SYS>><0x0A><0x0A>"),
        (IMAGE, "0"),
        (CONTEXT, "▁<0x0A>What?▁[/INST]"),
        (TRAINED, "▁A▁cat▁</s>"),
        (CONTEXT, "<s>[INST]▁And▁"),
        (IMAGE, "1"),
        (CONTEXT, "▁?▁[/INST]"),
        (TRAINED, "▁Red▁</s>"),
    ],
    "hermes-2": [
        (CONTEXT, "<s><|im_start|>system<0x0A>Answer▁the▁questions.<|im_end|><0x0A><|im_start|>user<0x0A>"),
        (IMAGE, "0"),
        (CONTEXT, "▁<0x0A>What?<|im_end|><0x0A><|im_start|>assistant<0x0A>"),
        (TRAINED, "A▁cat<|im_end|>"),
        (CONTEXT, "<0x0A><|im_start|>user<0x0A>And▁"),
        (IMAGE, "1"),
        (CONTEXT, "▁?<|im_end|><0x0A><|im_start|>assistant<0x0A>"),
        (TRAINED, "Red<|im_end|>"),
    ],
    "llama_3": [
        (CONTEXT, f"<s><|start_header_id|>system<|end_header_id|><0x0A><0x0A>{_LLAVA_SYSTEM}<|eot_id|>{_USER_3}"),
        (IMAGE, "0"),
        (CONTEXT, f"▁<0x0A>What?<|eot_id|>{_ASSISTANT_3}"),
        (TRAINED, "A▁cat<|eot_id|>"),
        (CONTEXT, f"{_USER_3}And▁"),
        (IMAGE, "1"),
        (CONTEXT, f"▁?<|eot_id|>{_ASSISTANT_3}"),
        (TRAINED, "Red<|eot_id|>"),
    ],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_token_of_two_turns_with_images_in_a_template(folder, tmp_path, template):
    dataset = prepare(folder, "conversations", CONVERSATION, tmp_path / "d", "--template", template)
    assert sequences(folder, dataset) == [expand(TEMPLATES[template])]


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        ("vicuna_v1", "<s>▁▁USER:▁"),
        ("llama_2", "<s>▁[INST]▁"),
        ("hermes-2", "<s><|im_start|>user<0x0A>"),
        ("llama_3", f"<s>{_USER_3}"),
    ],
)
def test_every_token_without_a_system_prompt(folder, tmp_path, template, opening):
    dataset = prepare(folder, "conversations", CONVERSATION, tmp_path / "d", "--template", template, "--system", "none")
    assert sequences(folder, dataset) == [expand([(CONTEXT, opening), *TEMPLATES[template][1:]])]


def test_every_token_of_an_m3it_record(folder, tmp_path):
    pictures = [base64.b64encode((folder / f"{number}.png").read_bytes()).decode() for number in (3, 2)]
    record = {"instruction": "Look. ", "inputs": "Which?", "image_base64_str": pictures, "outputs": "The left"}
    dataset = prepare(folder, "conversations", record, tmp_path / "d", "--system", "none")
    assert sequences(folder, dataset) == [
        expand(
            [
                (CONTEXT, "<s>▁▁USER:▁"),
                (IMAGE, "3"),
                (CONTEXT, "▁<0x0A>"),
                (IMAGE, "2"),
                (CONTEXT, "▁<0x0A>Look.▁Which?▁ASSISTANT:"),
                (TRAINED, "▁The▁left</s>"),
            ]
        )
    ]


# ------------------------------------------------------------------------------------------------ interleaved

# Listed are seven images: the last is left out, though it stands before the last sentence. Images are listed in another
# order than they stand in; 1 and 5 share a sentence, and so do 0, 2 and 4.
MMC4 = {
    "url": "u",
    "text_list": ["One.", "Two.", "An <image> tag.", "Four."],
    "image_info": [
        {"image_name": f"{number}.png", "matched_text_index": index, "matched_sim": 0.3}
        for number, index in enumerate((2, 0, 2, 1, 2, 0, 3))
    ],
}
_ALL_TEXT = "▁One.▁Two.▁An▁<IMAGE>▁tag.▁Four.</s>"


def pair(number: int, text: str) -> list[tuple[str, str]]:
    return [(CONTEXT, "<s>"), (IMAGE, str(number)), (TRAINED, text)]


VARIANTS = {
    "full": [
        [
            (CONTEXT, "<s>"),
            (IMAGE, "1"),
            (IMAGE, "5"),
            (TRAINED, "▁One."),
            (IMAGE, "3"),
            (TRAINED, "▁Two."),
            (IMAGE, "0"),
            (IMAGE, "2"),
            (IMAGE, "4"),
            (TRAINED, "▁An▁<IMAGE>▁tag.▁Four.</s>"),
        ]
    ],
    "pairs": [
        pair(1, "▁One.</s>"),
        pair(5, "▁One.</s>"),
        pair(3, "▁Two.</s>"),
        pair(0, "▁An▁<IMAGE>▁tag.</s>"),
        pair(2, "▁An▁<IMAGE>▁tag.</s>"),
        pair(4, "▁An▁<IMAGE>▁tag.</s>"),
    ],
    "images-first": [
        [(CONTEXT, "<s>"), *((IMAGE, str(number)) for number in (1, 5, 3, 0, 2, 4)), (TRAINED, _ALL_TEXT)],
    ],
    "text-only": [[(CONTEXT, "<s>"), (TRAINED, _ALL_TEXT)]],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_of_an_mmc4_document(folder, tmp_path, variant):
    dataset = prepare(folder, "interleaved", MMC4, tmp_path / "d", "--variant", variant)
    assert sequences(folder, dataset) == [expand(sequence) for sequence in VARIANTS[variant]]


def images(*numbers: int) -> list[tuple[str, str]]:
    return [(IMAGE, str(number)) for number in numbers]


START = (CONTEXT, "<s>")
ONE, TWO, TAG = (TRAINED, "▁One."), (TRAINED, "▁Two."), (TRAINED, "▁An▁<IMAGE>▁tag.")
TAG_TO_END = (TRAINED, "▁An▁<IMAGE>▁tag.▁Four.</s>")
RULES = {
    "--keep-images first-in-text --max-images 4": [START, *images(1, 5), ONE, *images(3), TWO, *images(0), TAG_TO_END],
    "--keep-images first-listed --max-images 4": [START, *images(1), ONE, *images(3), TWO, *images(0, 2), TAG_TO_END],
    "--image-place after": [
        START,
        *(ONE, *images(1, 5), TWO, *images(3), TAG, *images(0, 2, 4)),
        (TRAINED, "▁Four.</s>"),
    ],
    "--text-after-last-image drop": [
        START,
        *(*images(1, 5), ONE, *images(3), TWO, *images(0, 2, 4)),
        (TRAINED, "▁An▁<IMAGE>▁tag.</s>"),
    ],
    "--text-after-last-image drop --image-place after": [
        START,
        *(ONE, *images(1, 5), TWO, *images(3), TAG, *images(0, 2, 4)),
        (TRAINED, "</s>"),
    ],
    "--no-bos --no-eos": [
        (CONTEXT, "1"),  # an image at the start
        *(*images(5), ONE, *images(3), TWO, *images(0, 2, 4)),
        (TRAINED, "▁An▁<IMAGE>▁tag.▁Four."),
    ],
}


@pytest.mark.parametrize("options", RULES)
def test_every_token_of_an_mmc4_document_by_other_rules_than_the_paper(folder, tmp_path, options):
    dataset = prepare(folder, "interleaved", MMC4, tmp_path / "d", *options.split())
    assert sequences(folder, dataset) == [expand(RULES[options])]


# ---------------------------------------------------------------------------------------------------- inspect


class _Page(HTMLParser):
    """Collects texts with the classes they stand in, and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        if tag == "span":
            self.open.append(dict(attrs)["class"].removeprefix("text "))
        elif tag == "img":
            self.shown.append([IMAGE, ""])

    def handle_endtag(self, tag):
        if tag == "span":
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.shown.append([" ".join(self.open), data])


def in_colour(sequence: list[tuple[str, str]]) -> list[list[str]]:
    """Return what a page shows of a sequence; the mark before a text of its own is not shown."""
    shown: list[list[str]] = []
    is_own = True
    for mask, run in sequence:
        for part in re.split(f"({'|'.join(map(re.escape, CONTROL))})", run if mask != IMAGE else ""):
            if part in CONTROL:
                shown.append([f"{mask} control", part])
            elif part:
                text = part.removeprefix("▁") if is_own else part
                shown.append([mask, text.replace("▁", " ").replace("<0x0A>", "\n")])
                is_own = False
        if mask == IMAGE:
            shown.append([IMAGE, ""])
            is_own = True
    return shown


@pytest.mark.parametrize("template", TEMPLATES)
def test_inspect_shows_every_token_in_the_colour_of_its_mask(folder, tmp_path, template):
    prepare(folder, "conversations", CONVERSATION, tmp_path / "d", "--template", template)
    model, path = str(folder / "characters.model"), tmp_path / "page.html"
    assert main(["data", "inspect", str(tmp_path / "d"), "--tokenizer", model, "--output", str(path)]) == 0
    page = _Page()
    page.feed(path.read_text().partition("<h2>")[2])
    assert page.shown == in_colour(TEMPLATES[template])
