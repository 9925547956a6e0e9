import numpy as np
import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.data.documents import Control, Document, Image, Special, Text
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.samples import ImageSegment
from megatron_vlm.data.text.encoding import encode_document, encode_segments
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.support.byte_pair import write_smollm2

IMAGE = Image(b"picture")


def flat(segments) -> list:
    """Segments as [ids, train] pairs and image bytes."""
    return [s.encoded if isinstance(s, ImageSegment) else (s.input_ids.tolist(), s.train) for s in segments]


def test_a_pair_is_bos_image_caption_eos_all_trained(tokenizer):
    sample = encode_document(Document((IMAGE, Text("a red cat"))), tokenizer)
    caption = tokenizer.encode("a red cat")
    assert flat(sample.segments) == [([1], True), b"picture", ([*caption, 2], True)]


def test_each_stretch_of_text_is_tokenised_alone(tokenizer):
    sample = encode_document(Document((Text("the sky"), IMAGE, Text("water"))), tokenizer)
    assert flat(sample.segments) == [
        ([1, *tokenizer.encode("the sky")], True),
        b"picture",
        ([*tokenizer.encode("water"), 2], True),
    ]


def test_ids_are_int32(tokenizer):
    sample = encode_document(Document((Text("the sky"),)), tokenizer)
    assert sample.segments[0].input_ids.dtype == np.int32


def test_bos_and_eos_are_left_out_on_request(tokenizer):
    sample = encode_document(Document((Text("the sky"),)), tokenizer, bos=False, eos=False)
    assert flat(sample.segments) == [(tokenizer.encode("the sky"), True)]


def test_a_change_of_the_mask_starts_a_new_segment(tokenizer):
    segments = encode_segments((Text("what is", False), Text(" a cat", True)), tokenizer)
    assert flat(segments) == [
        (tokenizer.encode("what is"), False),
        (tokenizer.encode(" a cat", continuation=True), True),
    ]


def test_text_after_a_control_token_continues_except_after_the_first_bos(tokenizer):
    bos, eos = Special(Control.BOS), Special(Control.EOS)
    (first,) = encode_segments((bos, Text("cat"), eos, bos, Text("cat")), tokenizer)
    word, rest = tokenizer.encode("cat"), tokenizer.encode("cat", continuation=True)
    assert word != rest
    assert first.input_ids.tolist() == [1, *word, 2, 1, *rest]


def test_special_piece_is_one_token(tokenizer):
    (segment,) = encode_segments((Special("<|im_end|>"),), tokenizer)
    assert segment.input_ids.tolist() == [tokenizer.piece_id("<|im_end|>")]


def test_a_tokenizer_without_bos_begins_with_the_text(tmp_path):
    tokenizer = load_tokenizer(write_smollm2(tmp_path))
    sample = encode_document(Document((Text("the sky"), IMAGE)), tokenizer)
    assert flat(sample.segments) == [(tokenizer.encode("the sky"), True), b"picture", ([tokenizer.eos_id], True)]
    assert encode_segments((Special(Control.BOS), IMAGE), tokenizer) == encode_segments((IMAGE,), tokenizer)


def test_special_piece_that_the_tokenizer_lacks_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="needs the token <|eot_id|>"):
        encode_segments((Special("<|eot_id|>"),), tokenizer)


@pytest.mark.parametrize("segments", [(), (IMAGE,), (Text("a", False),), (IMAGE, Text("", True))])
def test_document_without_trained_text_is_rejected(tokenizer, segments):
    with pytest.raises(RejectError, match="nothing_to_train"):
        encode_document(Document(segments), tokenizer)
