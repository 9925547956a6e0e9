import pytest

from megatron_vlm.config import CheckpointError
from megatron_vlm.config.towers.radio import Config
from megatron_vlm.convert.families import radio, radio_nvlabs
from megatron_vlm.convert.family import find_family

# config.json of nvidia/RADIO-H, without what our tower does not look at.
PUBLISHED = {
    "architectures": ["RADIOModel"],
    "version": "radio_v2.5-h",
    "patch_size": 16,
    "max_resolution": 2048,
    "preferred_resolution": [768, 768],
    "args": {
        "model": "vit_huge_patch16_224",
        "cpe_max_size": 2048,
        "cls_token_per_teacher": True,
        "register_multiple": 8,
        "teachers": [
            {"name": "clip"},
            {"name": "siglip"},
            {"name": "dino_v2"},
            {"name": "sam", "use_summary": False},
        ],
    },
}


def test_the_folder_of_nvidia_is_found_by_its_architecture():
    assert find_family("RADIOModel", "vision", "config.json") is radio_nvlabs
    expected = Config(image_size=768, num_layers=32, hidden_size=1280, ffn_hidden_size=5120, num_attention_heads=16)
    assert radio_nvlabs.config_from_hf(PUBLISHED, where="config.json") == expected
    assert radio_nvlabs.rules(expected) == radio.rules(expected)
    assert radio_nvlabs.config_to_hf(expected) == radio.config_to_hf(expected)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"register_multiple": None, "cpe_num_registers": 6}, (4, 6, (0, 1, 2))),
        ({"register_multiple": 4}, (4, 4, (0, 1, 2))),
        ({"cls_token_per_teacher": False, "register_multiple": None}, (1, 0, (0,))),
    ],
)
def test_tokens_of_nvidia_are_counted_as_its_code_does(changes, tokens):
    vision = radio_nvlabs.config_from_hf({**PUBLISHED, "args": {**PUBLISHED["args"], **changes}}, where="")
    assert (vision.num_class_tokens, vision.num_registers, vision.summary_tokens) == tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"args": {"model": "dinov2_vitg14_reg"}}, "the tower is a dinov2_vitg14_reg .*ViT that is base, large, huge"),
        ({"args": None}, "the tower is a None"),
        ({"vitdet_window_size": 16}, "the tower has vitdet_window_size=16"),
        ({"feature_normalizer_config": {"embed_dim": 3}}, "the tower has feature_normalizer_config="),
    ],
)
def test_a_tower_of_nvidia_that_ours_cannot_be_is_refused(settings, message):
    with pytest.raises(CheckpointError, match=message):
        radio_nvlabs.config_from_hf({**PUBLISHED, **settings}, where="config.json")
