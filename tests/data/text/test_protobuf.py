import pytest
import sentencepiece

from megatron_vlm.data.text.protobuf import make_control_pieces, read_fields


def test_fields_are_numbers_and_bytes_with_their_ends():
    message = bytes([0x08, 0x96, 0x01, 0x12, 0x02, 0x68, 0x69, 0x1D, 1, 2, 3, 4])
    assert list(read_fields(message)) == [(1, 150, 3), (2, b"hi", 7), (3, b"\x01\x02\x03\x04", 12)]


def test_only_the_named_pieces_of_users_become_control_pieces(tokenizer_path):
    model = tokenizer_path.read_bytes()
    changed = make_control_pieces(model, lambda piece: piece in ("<|im_end|>", "▁cat", "<s>"))
    before, after = (sentencepiece.SentencePieceProcessor(model_proto=content) for content in (model, changed))
    ids = range(before.vocab_size())
    assert [token for token in ids if before.is_control(token) != after.is_control(token)] == [
        before.piece_to_id("<|im_end|>")
    ]
    assert [before.id_to_piece(token) for token in ids] == [after.id_to_piece(token) for token in ids]


@pytest.mark.parametrize("content", [b"", b"{}", b"\x0a\xff", b"\x0a\x02\x18\x04", b"\x0a", b"\x0f", bytes(range(256))])
def test_other_files_are_returned_as_they_are(content):
    assert make_control_pieces(content, lambda piece: True) == content
