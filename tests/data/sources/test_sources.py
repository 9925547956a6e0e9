import base64

import pytest

from megatron_vlm.config import ConfigError
from megatron_vlm.config.prepare import ConversationRules, ImageLimits, ImageRules, TextRules
from megatron_vlm.config.sources.interleaved import InterleavedRules
from megatron_vlm.config.sources.pairs import Options as PairOptions
from megatron_vlm.data.documents import Image, Special, Text
from megatron_vlm.data.files.inputs import find_record_files
from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.image_store import FolderImages, ImageReader
from megatron_vlm.data.sources.instructions.conversations import ConversationSource
from megatron_vlm.data.sources.interleaved.source import InterleavedSource
from megatron_vlm.data.sources.pairs.source import RecordPairSource, TarPairSource
from megatron_vlm.data.sources.pairs.source import find_source as find_pair_source
from megatron_vlm.data.sources.source import key_of
from megatron_vlm.data.sources.text import TextSource


@pytest.fixture
def names(tmp_path, make_image):
    """Three pictures a.jpg, b.jpg, c.jpg in a folder, by content."""
    root = tmp_path / "pictures"
    root.mkdir()
    contents = {}
    for seed, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        contents[make_image(seed=seed)] = name
        (root / name).write_bytes(make_image(seed=seed))
    return contents


@pytest.fixture
def reader(tmp_path, names):
    return ImageReader(FolderImages(tmp_path / "pictures", max_bytes=10**6), ImageRules())


def shown(found, names=()) -> list | str:
    """Text, names of images, names of control tokens; the reason of a reject."""
    if isinstance(found.document, RejectError):
        return found.document.reason
    parts = []
    for segment in found.document.segments:
        if isinstance(segment, Image):
            parts.append(names[segment.data])
        elif isinstance(segment, Special):
            parts.append(segment.token)
        else:
            parts.append(segment.text)
    return parts


def info(name, index, **more):
    return {"image_name": name, "matched_text_index": index, **more}


def read_mmc4(tmp_path, make_lines, reader, record, **rules):
    path = make_lines(tmp_path / "docs.jsonl", [record])
    (found,) = InterleavedSource((path,), InterleavedRules(**rules)).read(path, reader)
    return found


def test_mmc4_image_stands_before_its_sentence_and_duplicates_stack(tmp_path, make_lines, reader, names):
    record = {"url": "u", "text_list": ["s0", "s1", "s2"]}
    record["image_info"] = [info("a.jpg", 2), info("b.jpg", 0), info("c.jpg", 2)]
    found = read_mmc4(tmp_path, make_lines, reader, record)
    assert shown(found, names) == ["b.jpg", "s0", "s1", "a.jpg", "c.jpg", "s2"]
    assert found.key == "u"


def test_mmc4_keeps_the_first_listed_images_not_the_first_in_the_text(tmp_path, make_lines, reader, names):
    record = {"text_list": ["s0", "s1"], "image_info": [info("a.jpg", 1), info("b.jpg", 1), info("c.jpg", 0)]}
    found = read_mmc4(tmp_path, make_lines, reader, record, max_images=2)
    assert shown(found, names) == ["s0", "a.jpg", "b.jpg", "s1"]
    assert reader.notes["images_beyond_max_images"] == 1


def test_mmc4_literal_placeholder_in_a_sentence_is_text(tmp_path, make_lines, reader, names):
    record = {"text_list": ["an <image> tag"], "image_info": [info("a.jpg", 0)]}
    assert shown(read_mmc4(tmp_path, make_lines, reader, record), names) == ["a.jpg", "an <IMAGE> tag"]


def test_mmc4_bad_image_rejects_the_document_or_is_left_out(tmp_path, make_lines, reader, names):
    record = {"text_list": ["s0"], "image_info": [info("a.jpg", 0), info("none.jpg", 0)]}
    assert shown(read_mmc4(tmp_path, make_lines, reader, record)) == "image_missing"
    found = read_mmc4(tmp_path, make_lines, reader, record, bad_image="image")
    assert shown(found, names) == ["a.jpg", "s0"]
    assert reader.notes["dropped_images"] == 1


@pytest.mark.parametrize(
    ("size", "rules", "reason"),
    [
        (20, ImageRules(min_bytes=1000), "image_bytes"),
        (20, ImageRules(limits=ImageLimits(min_side=30)), "image_side"),
        (400, ImageRules(max_bytes=10_000), "image_bytes"),
    ],
)
def test_mmc4_images_outside_of_the_size_limits_are_left_out_and_counted(
    tmp_path, make_lines, make_image, names, size, rules, reason
):
    (tmp_path / "pictures" / "other.jpg").write_bytes(make_image(size, size))
    reader = ImageReader(FolderImages(tmp_path / "pictures", max_bytes=10**6), rules)
    record = {"text_list": ["s0"], "image_info": [info("other.jpg", 0), info("b.jpg", 0)]}
    assert shown(read_mmc4(tmp_path, make_lines, reader, record)) == reason
    found = read_mmc4(tmp_path, make_lines, reader, record, bad_image="image")
    assert shown(found, names) == ["b.jpg", "s0"]
    assert reader.notes["dropped_images"] == 1


def test_mmc4_images_beyond_the_sentences_go_to_their_most_similar_one(tmp_path, make_lines, reader, names):
    infos = [info(name, 0, matched_sim=0.0) for name in ("a.jpg", "b.jpg", "c.jpg")]
    record = {"text_list": ["s0", "s1"], "image_info": infos}
    record["similarity_matrix"] = [[0.9, 0.1], [0.8, 0.2], [0.1, 0.7]]
    found = read_mmc4(tmp_path, make_lines, reader, record, assignment="linear")
    assert shown(found, names) == ["a.jpg", "b.jpg", "s0", "c.jpg", "s1"]


def test_mmc4_images_below_the_similarity_are_left_out(tmp_path, make_lines, reader, names):
    infos = [info("a.jpg", 0, matched_sim=0.3), info("b.jpg", 0, matched_sim=0.2)]
    record = {"text_list": ["s0"], "image_info": infos}
    assert shown(read_mmc4(tmp_path, make_lines, reader, record, min_similarity=0.25), names) == ["a.jpg", "s0"]
    assert shown(read_mmc4(tmp_path, make_lines, reader, record, min_similarity=0.5)) == "too_few_images"


def test_mmc4_assignment_is_computed_again_on_request(tmp_path, make_lines, reader, names):
    infos = [info("a.jpg", 0, matched_sim=0.9), info("b.jpg", 0, matched_sim=0.9)]
    record = {"text_list": ["s0", "s1"], "image_info": infos, "similarity_matrix": [[0.9, 0.8], [0.9, 0.1]]}
    seen = {
        assignment: shown(read_mmc4(tmp_path, make_lines, reader, record, assignment=assignment), names)
        for assignment in ("listed", "linear", "best")
    }
    assert seen["listed"] == seen["best"] == ["a.jpg", "b.jpg", "s0", "s1"]
    assert seen["linear"] == ["b.jpg", "s0", "a.jpg", "s1"]
    only = read_mmc4(tmp_path, make_lines, reader, record, assignment="linear", min_similarity=0.85)
    assert shown(only, names) == ["b.jpg", "s0", "s1"]


def test_mmc4_images_inside_of_the_json_are_read(tmp_path, make_lines, reader, names, make_image):
    encoded = base64.b64encode(make_image(seed=1)).decode()
    record = {"text_list": ["s0"], "image_info": [info("x", 0, image_base64=encoded)]}
    assert shown(read_mmc4(tmp_path, make_lines, reader, record), names) == ["b.jpg", "s0"]
    record["image_info"][0]["image_base64"] = "***"
    assert shown(read_mmc4(tmp_path, make_lines, reader, record)) == "image_base64"


GOOD = {"text_list": ["s0"], "image_info": [info("a.jpg", 0)]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_list": "s0"}, "json_type"),
        ({"text_list": [1]}, "json_type"),
        ({"text_list": ["a\x00"]}, "control_character"),
        ({"text_list": ["\ud800"]}, "invalid_unicode"),
        ({"text_list": ["<image>" * 1_000_000]}, "text_too_long"),
        ({"image_info": None}, "json_type"),
        ({"image_info": ["a.jpg"]}, "json_type"),
        ({"image_info": [info("a.jpg", 7)]}, "json_type"),
        ({"image_info": [info("a.jpg", -1)]}, "json_type"),
        ({"image_info": [info("a.jpg", "0")]}, "json_type"),
        ({"image_info": [info("a.jpg", True)]}, "json_type"),
        ({"image_info": [info(["a.jpg"], 0)]}, "image_missing"),
        ({"image_info": [info("../../etc/passwd", 0)]}, "image_path"),
        ({"image_info": [info("a.jpg", 0)] * 1001}, "too_many_images"),
        ({"image_info": []}, "too_few_images"),
    ],
)
def test_mmc4_bad_record_is_rejected_with_line_and_key_and_its_neighbours_are_intact(
    tmp_path, make_lines, reader, names, change, reason
):
    path = make_lines(tmp_path / "docs.jsonl", [GOOD, GOOD | {"url": "bad"} | change, GOOD])
    found = list(InterleavedSource((path,)).read(path, reader))
    assert [shown(one, names) for one in found] == [["a.jpg", "s0"], reason, ["a.jpg", "s0"]]
    assert (found[1].line, found[1].key) == (2, "bad")


def test_too_long_text_over_many_sentences_is_rejected(tmp_path, make_lines, reader):
    record = GOOD | {"text_list": ["x" * 30] * 10}
    rules = {"text": TextRules(max_characters=299)}
    assert shown(read_mmc4(tmp_path, make_lines, reader, record, **rules)) == "text_too_long"


def turns(*texts):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


def read_llava(tmp_path, make_lines, reader, record, **rules):
    path = make_lines(tmp_path / "llava.jsonl", [record])
    (found,) = ConversationSource((path,), ConversationRules(system="none", **rules)).read(path, reader)
    return found


def words(found, names) -> str:
    parts = shown(found, names)
    return parts if isinstance(parts, str) else "|".join(part for part in parts if isinstance(part, str))


def test_llava_images_stand_where_their_placeholders_do(tmp_path, make_lines, reader, names):
    record = {"image": ["a.jpg", "b.jpg"], "conversations": turns("<image>\nand <image> ?", "yes", "sure?", "no")}
    assert words(read_llava(tmp_path, make_lines, reader, record), names) == (
        " USER: |a.jpg|\nand |b.jpg| ? ASSISTANT:| yes|USER: sure? ASSISTANT:| no"
    )


def test_llava_images_of_later_turns_are_taken_in_order(tmp_path, make_lines, reader, names):
    record = {"image": ["a.jpg", "b.jpg"], "conversations": turns("<image>", "yes", "<image>", "no")}
    expected = " USER: |a.jpg| ASSISTANT:| yes|USER: |b.jpg| ASSISTANT:| no"
    assert words(read_llava(tmp_path, make_lines, reader, record), names) == expected


def test_llava_image_without_placeholder_stands_before_the_first_question(tmp_path, make_lines, reader, names):
    record = {"image": "a.jpg", "conversations": turns("what?", "a cat")}
    assert words(read_llava(tmp_path, make_lines, reader, record), names) == " USER: |a.jpg|\nwhat? ASSISTANT:| a cat"


def test_llava_images_can_be_put_in_front(tmp_path, make_lines, reader, names):
    record = {"image": "a.jpg", "conversations": turns("what?\n<image>", "a cat")}
    found = read_llava(tmp_path, make_lines, reader, record, image_position="front")
    assert words(found, names) == " USER: |a.jpg|\nwhat? ASSISTANT:| a cat"


def test_llava_plain_template_is_image_and_caption(tmp_path, make_lines, reader, names):
    record = {"image": "a.jpg", "conversations": turns("Describe it.\n<image>", "a cat")}
    assert words(read_llava(tmp_path, make_lines, reader, record, template="plain"), names) == "a.jpg|a cat\n"


def test_llava_first_turn_of_the_assistant_is_left_out_and_a_system_turn_is_used(tmp_path, make_lines, reader, names):
    record = {"conversations": [{"from": "gpt", "value": "hello"}, *turns("what?", "a cat")]}
    assert words(read_llava(tmp_path, make_lines, reader, record), names) == " USER: what? ASSISTANT:| a cat"
    record = {"conversations": [{"from": "system", "value": "be round"}, *turns("what?", "a cat")]}
    assert words(read_llava(tmp_path, make_lines, reader, record), names).startswith("be round USER: what?")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": "x"}, "json_type"),
        ({"conversations": []}, "turn_order"),
        ({"conversations": ["x"]}, "json_type"),
        ({"conversations": turns("q")}, "turn_order"),
        ({"conversations": turns("q", "")}, "empty_text"),
        ({"conversations": turns("q", "a", "q", " \n")}, "empty_text"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": []}]}, "empty_text"),
        ({"conversations": turns("q", "a", "q")}, "turn_order"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn_order"),
        ({"conversations": [{"from": "human", "value": 3}]}, "json_type"),
        ({"conversations": turns("<image>", "a")}, "placeholder_count"),
        ({"conversations": turns("<image>" * 70_000, "a"), "image": "a.jpg"}, "placeholder_count"),
        ({"conversations": turns("<image>" * 1_000_000, "a"), "image": "a.jpg"}, "text_too_long"),
        ({"conversations": turns("<image>", "a"), "image": ["a.jpg", "b.jpg"]}, "placeholder_count"),
        ({"conversations": turns("<image>", "a"), "image": {"x": 1}}, "json_type"),
        ({"conversations": turns("<image>", "a"), "image": "none.jpg"}, "image_missing"),
        ({"conversations": turns("<image>", "a"), "image": "../x.jpg"}, "image_path"),
        ({"conversations": turns("a\x07", "a")}, "control_character"),
    ],
)
def test_llava_bad_record_is_rejected_and_its_neighbours_are_intact(
    tmp_path, make_lines, reader, names, record, reason
):
    good = {"conversations": turns("what?", "a cat")}
    path = make_lines(tmp_path / "llava.jsonl", [good, record | {"id": 7}, good])
    found = list(ConversationSource((path,)).read(path, reader))
    assert [one.document.reason if isinstance(one.document, RejectError) else "" for one in found] == ["", reason, ""]
    assert (found[1].line, found[1].key) == (2, "7")


def test_flan_question_is_context_and_target_is_trained(tmp_path, make_lines, reader):
    path = make_lines(tmp_path / "flan.jsonl", [{"inputs": "what?", "targets": "a cat"}])
    (found,) = TextSource((path,)).read(path, reader)
    texts = [segment for segment in found.document.segments if isinstance(segment, Text)]
    assert texts == [Text(" USER: what? ASSISTANT:", False), Text(" a cat", True)]


def test_running_text_is_trained_whole(tmp_path, make_lines, reader):
    path = make_lines(tmp_path / "text.jsonl", [{"text": "the sky"}])
    (found,) = TextSource((path,)).read(path, reader)
    assert [s.text if isinstance(s, Text) else s.token.value for s in found.document.segments] == [
        "bos",
        "the sky",
        "eos",
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "what?", "input": "", "output": "a cat", "text": "### Instruction: what? ### Response: a cat"},
        {"conversations": None, "messages": None, "question": "what?", "answer": "a cat", "text": None},
        {"instruction": None, "output": None, "prompt": "what?", "response": "a cat"},
        {
            "messages": [
                {"from": None, "value": None, "role": "user", "content": "what?"},
                {"from": None, "value": None, "role": "assistant", "content": "a cat"},
            ]
        },
    ],
)
def test_null_fields_are_missing_and_a_conversation_goes_before_its_rendered_text(tmp_path, make_lines, reader, record):
    path = make_lines(tmp_path / "text.jsonl", [record])
    (found,) = TextSource((path,)).read(path, reader)
    texts = [segment for segment in found.document.segments if isinstance(segment, Text)]
    assert texts == [Text(" USER: what? ASSISTANT:", False), Text(" a cat", True)]


def test_text_beside_half_a_form_is_running_text(tmp_path, make_lines, reader):
    path = make_lines(tmp_path / "text.jsonl", [{"text": "the sky", "prompt": "title"}])
    (found,) = TextSource((path,)).read(path, reader)
    assert found.document.segments[1] == Text("the sky")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"inputs": "q"}, "json_type"),
        ({"inputs": "q", "targets": ""}, "empty_text"),
        ({"inputs": ["q"], "targets": "a"}, "json_type"),
        ({"text": 5}, "json_type"),
        ({}, "unknown_fields"),
        (b"{", "json_syntax"),
    ],
)
def test_bad_text_record_is_rejected(tmp_path, make_lines, reader, record, reason):
    path = make_lines(tmp_path / "text.jsonl", [record])
    (found,) = TextSource((path,)).read(path, reader)
    assert shown(found) == reason


def read_all(source, reader):
    return [found for path in source.inputs for found in source.read(path, reader)]


def captions(found) -> list[str]:
    return [shown(one) if isinstance(one.document, RejectError) else one.document.segments[1].text for one in found]


def test_coyo_tars_give_pairs_by_key(coyo, tmp_path, reader, make_image):
    found = read_all(find_pair_source((coyo,), PairOptions(), None), reader)
    assert captions(found) == [f"a red cat {shard} {number}" for shard in range(2) for number in range(4)]
    assert found[5].document.segments[0] == Image(make_image(seed=11), (48, 40))
    assert found[5].key == "000010001"


def test_tars_alone_are_enough_in_any_order_of_files(tmp_path, reader, make_tar, make_image):
    members = [(f"{n}.txt", b"caption %d" % n) for n in range(4)]
    members += [(f"{n}.png", make_image(seed=n, file_format="PNG")) for n in (3, 1, 0, 2)]
    make_tar(tmp_path / "0.tar", members)
    source = find_pair_source((tmp_path / "0.tar",), PairOptions(), None)
    for found in read_all(source, reader):
        assert found.document.segments[1].text == f"caption {found.key}"
        assert found.document.segments[0].data == make_image(seed=int(found.key), file_format="PNG")


def test_own_table_of_a_tar_explains_what_is_missing(tmp_path, reader, make_tar, make_image, make_table):
    make_tar(tmp_path / "0.tar", [("00.jpg", make_image())])
    columns = {"key": ["00", "01"], "caption": ["a cat", "a dog"], "status": ["success", "failed_to_download"]}
    make_table(tmp_path / "0.parquet", columns | {"url": ["u0", "u1"], "error_message": [None, "HTTP 404"]})
    source = find_pair_source((tmp_path,), PairOptions(), None)
    found = read_all(source, reader)
    assert captions(found) == ["a cat", "image_missing"]
    assert (found[1].key, "HTTP 404" in found[1].document.detail) == ("01", True)


@pytest.mark.parametrize("folder", ["./", "00000/", "./00000/"])
def test_a_tar_that_was_packed_again_with_folders_fits_its_own_table(
    tmp_path, reader, make_tar, make_image, make_table, folder
):
    make_tar(tmp_path / "0.tar", [(f"{folder}00.jpg", make_image()), (f"{folder}01.jpg", make_image(seed=1))])
    make_table(tmp_path / "0.parquet", {"key": ["00", "01"], "caption": ["a cat", "a dog"], "status": ["success"] * 2})
    assert captions(read_all(find_pair_source((tmp_path,), PairOptions(), None), reader)) == ["a cat", "a dog"]


def test_two_samples_do_not_share_a_row_of_the_table(tmp_path, reader, make_tar, make_image, make_table):
    make_tar(tmp_path / "0.tar", [("a/00.jpg", make_image()), ("b/00.jpg", make_image(seed=1))])
    make_table(tmp_path / "0.parquet", {"key": ["00"], "caption": ["a cat"], "status": ["success"]})
    assert captions(read_all(find_pair_source((tmp_path,), PairOptions(), None), reader)) == ["a cat", "duplicate_name"]


def test_a_score_that_is_not_a_number_harms_no_pair(tmp_path, reader, make_tar, make_image):
    make_tar(tmp_path / "0.tar", [("0.jpg", make_image()), ("0.json", b'{"caption": "a cat", "score": NaN}')])
    assert captions(read_all(find_pair_source((tmp_path / "0.tar",), PairOptions(), None), reader)) == ["a cat"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.txt", b"a")], "image_missing"),
        ([("1.jpg", None)], "caption_missing"),
        ([("1.jpg", None), ("1.txt", b"\xff\xfe")], "invalid_utf8"),
        ([("1.jpg", None), ("1.txt", b"  ")], "empty_text"),
        ([("1.jpg", None), ("1.txt", b"a\x00")], "control_character"),
        ([("1.jpg", None), ("1.txt", b"<image>" * 100_000)], "text_too_long"),
        ([("1.jpg", None), ("1.json", b"{")], "json_syntax"),
        ([("1.jpg", None), ("1.jpg", None), ("1.txt", b"a")], "duplicate_name"),
        ([("1.jpg", b""), ("1.txt", b"a")], "image_empty"),
        ([("1.jpg", b"<html>"), ("1.txt", b"a")], "image_format"),
    ],
)
def test_bad_pair_of_a_tar_is_rejected_and_its_neighbours_are_intact(
    tmp_path, reader, make_tar, make_image, members, reason
):
    def good(key):
        return [(f"{key}.jpg", make_image()), (f"{key}.txt", b"a cat")]

    bad = [(name, make_image() if content is None else content) for name, content in members]
    path = make_tar(tmp_path / "0.tar", good(0) + bad + good(2))
    found = list(TarPairSource((path,)).read(path, reader))
    assert captions(found) == ["a cat", reason, "a cat"]
    assert found[1].key == "1"


def test_truncated_tar_keeps_what_is_whole(coyo, tmp_path, reader):
    path = coyo / "00001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = captions(read_all(find_pair_source((coyo,), PairOptions(), None), reader))
    assert found[:4] == [f"a red cat 0 {n}" for n in range(4)]
    assert found[-1] == "tar_truncated"


def test_pairs_of_json_lines_name_an_image_file(tmp_path, reader, names, make_lines):
    records = [{"image": "a.jpg", "caption": "a cat"}, {"file_name": "b.jpg", "text": "a dog", "id": 4}]
    path = make_lines(tmp_path / "pairs.jsonl", records + [{"image": "a.jpg"}, {"caption": "x"}, b"{"])
    found = list(RecordPairSource((path,)).read(path, reader))
    assert [shown(one, names) for one in found] == [
        ["a.jpg", "a cat"],
        ["b.jpg", "a dog"],
        "json_type",
        "image_missing",
        "json_syntax",
    ]
    assert [one.key for one in found] == ["a.jpg", "4", "a.jpg", None, None]


def test_folder_without_tars_is_read_as_json_lines(tmp_path, make_lines):
    path = make_lines(tmp_path / "pairs.jsonl", [])
    assert find_pair_source((tmp_path,), PairOptions(), None) == RecordPairSource((path,))


def test_missing_and_empty_inputs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="input does not exist .*none"):
        find_record_files((tmp_path / "none",))
    with pytest.raises(ConfigError, match="input has no JSON"):
        find_record_files((tmp_path,))


def test_keys_are_text_of_bounded_length():
    assert key_of(5) == "5"
    assert len(key_of("x" * 10_000)) == 300
    assert key_of(["a"]) is None


def test_parquet_files_that_list_pairs_are_left_alone_and_named(coyo, caplog):
    (coyo / "part-00000.parquet").write_bytes(b"never opened")
    source = find_pair_source((coyo,), PairOptions(), None)
    assert [path.name for path in source.inputs] == ["00000.tar", "00001.tar"]
    assert "1 parquet files do not belong to a tar and are not read" in caplog.text
    assert "select pairs" in caplog.text


def test_a_parquet_file_named_by_itself_that_lists_pairs_is_refused(coyo):
    with pytest.raises(ConfigError, match="input has no tars, as the other inputs have .*part-00000.parquet"):
        find_pair_source((coyo / "00000.tar", coyo / "part-00000.parquet"), PairOptions(), None)
