import pytest

from megatron_vlm.config import ConfigError, LanguageConfig, ModelConfig
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.projectors.linear import Config as LinearConfig
from megatron_vlm.config.towers.clip import Config as ClipConfig

SIZES = {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}


def model_of(vision, **parts):
    return ModelConfig(language=LanguageConfig(**SIZES, vocab_size=32000), vision=vision, **parts)


@pytest.mark.parametrize(("image_size", "tokens"), [(336, 576), (224, 256)])
def test_an_image_of_any_size_has_the_tokens_of_the_square(image_size, tokens):
    model = model_of(ClipConfig(**SIZES, image_size=image_size))
    assert {model.num_image_tokens(*size) for size in ((1, 1), (640, 480), (image_size, image_size))} == {tokens}
    assert model.constant_image_tokens == model.fixed_image_tokens("this test") == tokens


class AnySize(ClipConfig):
    """A tower with one patch for every whole 14 x 14 pixels of the image."""

    __slots__ = ()
    constant_grid = None

    def patch_grid(self, width, height):
        return Grid(height // 14, width // 14)


class PixelShuffle(LinearConfig):
    """A projection that makes one token of four patches."""

    __slots__ = ()

    def token_grid(self, patches):
        return Grid(patches.rows // 2, patches.columns // 2)


def test_tokens_follow_the_size_of_the_image_where_the_tower_lets_them():
    model = model_of(AnySize(**SIZES))
    assert model.num_image_tokens(640, 480) == 45 * 34
    assert model.constant_image_tokens is None


def test_the_projection_has_the_last_word_on_the_tokens():
    assert model_of(ClipConfig(**SIZES), projection=PixelShuffle()).constant_image_tokens == 144
    assert model_of(AnySize(**SIZES), projection=PixelShuffle()).num_image_tokens(640, 480) == 22 * 17


@pytest.mark.parametrize("method", ["fixed_image_tokens", "fixed_patches"])
def test_code_that_needs_images_of_one_size_says_so(method):
    with pytest.raises(
        ConfigError, match=r"this test needs the same number of tokens for every image \(model.vision\)"
    ):
        getattr(model_of(AnySize(**SIZES)), method)("this test")
