"""Tokens of an image: a number, or a function of its size that is asked once for each size."""

import numpy as np
import pytest

from megatron_vlm.data.plan import image_tokens as module
from megatron_vlm.data.plan.image_tokens import ImageTokens
from tests.support.configs import tiny_model


def count(width: int, height: int) -> int:
    return -(-width // 14) * -(-height // 14)


class SizedModel:
    """Stands for a model whose tower takes images of any size."""

    constant_image_tokens = None
    num_image_tokens = staticmethod(count)


def test_model_of_square_images_has_a_constant():
    model = tiny_model()
    tokens = ImageTokens.from_model(model)
    assert tokens.constant == tokens.describe() == model.constant_image_tokens
    assert tokens.of_image(None) == tokens.of_image((640, 480)) == model.num_image_tokens(640, 480)
    assert tokens.of_images(np.ones((3, 2), np.uint16)).tolist() == [tokens.constant] * 3


def test_model_of_other_images_is_asked_and_named_by_its_parts(monkeypatch):
    trees = [
        {"vision": {"patch_size": size}, "projection": {"type": "linear"}, "language": {}} for size in (14, 14, 16)
    ]
    found = []
    for tree in trees:
        monkeypatch.setattr(module, "config_to_dict", lambda model, tree=tree: tree)
        found.append(ImageTokens.from_model(SizedModel()))
    assert found[0].of_image((640, 480)) == 46 * 35
    assert found[0].describe() == found[1].describe() != found[2].describe()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_many_images_have_the_tokens_of_each_and_every_size_is_asked_once(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    sizes = np.random.default_rng(0).integers(65500, 65536, (5000, 2)).astype(np.uint16)
    asked = []
    tokens = ImageTokens(function=lambda width, height: asked.append((width, height)) or count(width, height))
    found = tokens.of_images(sizes)
    assert found.dtype == np.int32
    assert found.tolist() == [count(width, height) for width, height in sizes.tolist()]
    assert len(asked) == len(set(asked)) <= 36 * 36


def test_no_images_have_no_tokens():
    assert ImageTokens(function=count).of_images(np.zeros((0, 2), np.uint16)).shape == (0,)


def test_image_of_unknown_size_is_refused():
    with pytest.raises(ValueError, match="depends on the size of the image, which is unknown"):
        ImageTokens(function=count).of_image(None)


def test_image_without_a_token_is_refused():
    with pytest.raises(ValueError, match="image of 3x5 pixels would take 0 tokens"):
        ImageTokens(function=lambda width, height: 0).of_images(np.array([[3, 5]], np.uint16))
