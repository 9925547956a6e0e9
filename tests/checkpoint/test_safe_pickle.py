"""Every opcode that calls or changes something, with what a hostile file would have it do."""

import io
import pickle
import pickletools
import shutil

import pytest
import torch
from torch.distributed.checkpoint import metadata

from megatron_vlm.checkpoint.safe_pickle import UNREADABLE, check_object, unpickle_index
from megatron_vlm.checkpoint.tensors import write_weights
from tests.support.hostile import Call, touching

METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
PROPERTIES = b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n"
SIZE = b"ctorch\nSize\n"
SYSTEM = b"cos\nsystem\n"
LAYOUT = b"ctorch.serialization\n_get_layout\n"
TRUE = b"(S'true'\nt"
HOSTILE = {
    "global": SYSTEM + TRUE + b"R.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(" + SYSTEM + b"S'true'\no.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93(\x8c\x04truet\x85R.",
    "dotted_name": b"\x80\x04\x8c\x05torch\x8c\x0eserialization.os\x93.",
    "dotted_name_of_a_record": b"\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
    "function_of_torch": b"ctorch.distributed.checkpoint.format_utils\ntorch_save_to_dcp\n(S'a'\nS'b'\ntR.",
    "class_of_torch": b"ctorch.distributed.checkpoint.filesystem\nFileSystemReader\n(S'a'\ntR.",
    "getattr_of_a_class": b"cbuiltins\ngetattr\n(" + METADATA + b"S'__init__'\ntR.",
    "getattr_of_an_enum": b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    b"S'mro'\ntR.",
    "reduce_of_a_record": METADATA + b"(}}tR.",
    "newobj_with_arguments": b"\x80\x02" + METADATA + b"}\x85\x81.",
    "newobj_of_a_constructor": b"\x80\x02" + SIZE + b")\x81.",
    "newobj_ex": b"\x80\x04" + METADATA + b")}\x8c\x01aK\x01s\x92.",
    "constructor_of_another_type": SIZE + b"(S'ab'\ntR.",
    "constructor_of_a_call": LAYOUT + b"(" + METADATA + b"tR.",
    "build_of_a_class": b"\x80\x02" + METADATA + b"N}X\x08\x00\x00\x00__init__" + SIZE + b"s\x86b.",
    "build_of_a_class_with_setstate": b"\x80\x02" + PROPERTIES + b"}b.",
    "build_of_a_function": b"\x80\x02" + LAYOUT + b"}X\x05\x00\x00\x00cache}sb.",
    "build_with_a_method": b"\x80\x02" + METADATA + b")\x81}X\x06\x00\x00\x00append" + SIZE + b"sb.",
    "build_with_slots": b"\x80\x02" + METADATA + b")\x81N}X\x09\x00\x00\x00__class__" + SIZE + b"s\x86b.",
    "build_with_a_special_name": b"\x80\x02" + METADATA + b")\x81}X\x09\x00\x00\x00__class__K\x01sb.",
    "append_to_a_class": METADATA + b"K\x01a.",
    "persistent_id": b"Pthe id\n.",
    "binary_persistent_id": b"\x80\x02K\x01Q.",
    "extension": b"\x80\x02\x82\x01.",
    "no_index": b"\x80\x02}.",
    "huge": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_calls_or_changes_anything_is_refused(name):
    with pytest.raises(UNREADABLE):
        unpickle_index(io.BytesIO(HOSTILE[name]))


def test_the_hostile_pickles_are_well_formed():
    covered = {opcode.name for content in HOSTILE.values() for opcode, _, _ in pickletools_of(content)}
    calling = {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "GLOBAL", "STACK_GLOBAL", "EXT1", "APPEND"}
    assert calling | {"PERSID", "BINPERSID"} <= covered


def pickletools_of(content):
    try:
        yield from pickletools.genops(content)
    except ValueError:  # a length that the content does not have
        return


def test_classes_stay_as_they_are():
    before = dict(vars(metadata.Metadata))
    for content in HOSTILE.values():
        with pytest.raises(UNREADABLE):
            unpickle_index(io.BytesIO(content))
    assert dict(vars(metadata.Metadata)) == before


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    content = (write_weights(run, {"model.weight": torch.arange(6.0)}, {}) / ".metadata").read_bytes()
    shutil.rmtree(run)
    return content


def test_an_index_of_torch_is_read(index):
    found = unpickle_index(io.BytesIO(index))
    (weight,) = found.state_dict_metadata.values()
    assert (list(found.state_dict_metadata), weight.size) == (["model.weight"], (6,))
    assert weight.properties.dtype is torch.float32
    assert [place.fqn for place in found.storage_data] == ["model.weight"]


def test_an_index_cut_anywhere_is_refused(index):
    for length in range(0, len(index), 7):
        with pytest.raises(UNREADABLE):
            unpickle_index(io.BytesIO(index[:length]))


def test_an_index_of_plans_is_read():
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

    place = metadata.MetadataIndex("key", torch.Size((1,)))
    plan = SavePlan([WriteItem(place, WriteItemType.SHARD)])
    content = pickle.dumps(metadata.Metadata({"key": metadata.BytesStorageMetadata()}, planner_data=[plan]))
    assert list(unpickle_index(io.BytesIO(content)).state_dict_metadata) == ["key"]


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def as_bytes(value):
    """Return the pickle of a value as a tensor, as transformer-engine stores its state."""
    return saved(torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8))


def test_an_extra_state_of_tensors_and_numbers_passes():
    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"num_gemms": 1}}
    check_object(as_bytes(state))
    check_object(saved(torch.empty(0, dtype=torch.uint8)))


def test_an_extra_state_that_would_run_code_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    within = Call(torch.storage._load_from_bytes, pickle.dumps(touching(canary)))
    for content in (saved(touching(canary)), as_bytes(touching(canary)), as_bytes({"scale_fwd": within})):
        with pytest.raises(UNREADABLE):
            check_object(content)
    with pytest.raises(UNREADABLE, match="extra state is a int"):
        check_object(saved([1]))
    assert not canary.exists()
