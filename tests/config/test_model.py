import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError, LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.config.grid import Grid

LANGUAGE = {
    "vocab_size": 32000,
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
}
VISION = {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}


def test_added_tokens_of_llama_2_are_those_of_llava():
    language = LanguageConfig(**LANGUAGE)
    assert (language.image_token_id, language.pad_token_id, language.padded_vocab_size) == (32000, 32001, 32064)


@given(st.integers(1, 10**6))
def test_padded_vocabulary_holds_the_added_tokens_in_whole_blocks(vocab_size):
    language = LanguageConfig(**{**LANGUAGE, "vocab_size": vocab_size})
    assert language.padded_vocab_size % 64 == 0
    assert vocab_size + 2 <= language.padded_vocab_size < vocab_size + 2 + 64


def test_heads_and_groups_follow_from_the_width_by_default():
    language = LanguageConfig(**LANGUAGE)
    assert (language.query_groups, language.head_channels) == (32, 128)


def test_heads_and_groups_can_be_set():
    language = LanguageConfig(**LANGUAGE, num_query_groups=8, kv_channels=64)
    assert (language.query_groups, language.head_channels) == (8, 64)


def test_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"model.language.hidden_size=4096 is not a multiple of .*=30"):
        LanguageConfig(**{**LANGUAGE, "num_attention_heads": 30})


def test_width_need_not_divide_where_the_head_has_a_size_of_its_own():
    assert LanguageConfig(**{**LANGUAGE, "num_attention_heads": 30, "kv_channels": 128}).head_channels == 128


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ConfigError, match=r"num_attention_heads=32 is not a multiple of num_query_groups=5"):
        LanguageConfig(**LANGUAGE, num_query_groups=5)


def model_of(vision):
    return ModelConfig(language=LanguageConfig(**LANGUAGE), vision=vision)


@pytest.mark.parametrize(("image_size", "tokens"), [(336, 576), (224, 256)])
def test_clip_hands_over_one_token_a_patch_whatever_the_size_of_the_image(image_size, tokens):
    model = model_of(VisionConfig(**VISION, image_size=image_size))
    assert model.vision.num_patches == model.constant_image_tokens == tokens
    assert {model.num_image_tokens(*size) for size in ((1, 1), (640, 480), (image_size, image_size))} == {tokens}
    assert model.fixed_image_tokens("this test") == tokens


class AnySize(VisionConfig):
    """A tower with one patch for every whole 14 x 14 pixels of the image."""

    __slots__ = ()
    constant_grid = None

    def patch_grid(self, width, height):
        return Grid(height // 14, width // 14)


def test_tokens_follow_the_size_of_the_image_where_the_tower_lets_them():
    model = model_of(AnySize(**VISION))
    assert model.num_image_tokens(640, 480) == 45 * 34
    assert model.num_image_tokens(480, 640) == 45 * 34
    assert model.constant_image_tokens is None
    with pytest.raises(
        ConfigError, match=r"this test needs the same number of tokens for every image \(model.vision\)"
    ):
        model.fixed_image_tokens("this test")


@pytest.mark.parametrize(("feature_layer", "layers_run"), [(-1, 24), (-2, 23), (-24, 1)])
def test_layers_after_the_feature_layer_do_not_run(feature_layer, layers_run):
    assert VisionConfig(**VISION, feature_layer=feature_layer).num_layers_run == layers_run


@pytest.mark.parametrize("feature_layer", [0, 1, -25])
def test_feature_layer_outside_the_tower_is_refused(feature_layer):
    with pytest.raises(ConfigError, match=f"feature_layer={feature_layer} is not a layer of 24"):
        VisionConfig(**VISION, feature_layer=feature_layer)


def test_image_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ConfigError, match=r"image_size=335 is not a multiple of patch_size=14"):
        VisionConfig(**VISION, image_size=335)


def test_tower_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"model.vision.hidden_size=1024 is not a multiple of num_attention_heads=7"):
        VisionConfig(**{**VISION, "num_attention_heads": 7})


@pytest.mark.parametrize("name", ["vocab_size", "num_layers", "hidden_size", "num_attention_heads"])
def test_size_of_the_decoder_that_is_not_positive_is_refused(name):
    with pytest.raises(ConfigError, match=f"model.language.{name}=0 is not positive"):
        LanguageConfig(**{**LANGUAGE, name: 0})


@pytest.mark.parametrize("name", ["patch_size", "num_layers", "num_attention_heads"])
def test_size_of_the_tower_that_is_not_positive_is_refused(name):
    with pytest.raises(ConfigError, match=f"model.vision.{name}=-1 is not positive"):
        VisionConfig(**{**VISION, name: -1})
