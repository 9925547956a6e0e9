import pytest

from megatron_vlm.config import UsageError
from megatron_vlm.config.prepare import Recipe
from megatron_vlm.config.sources.interleaved import InterleavedRules, Options


def test_fewest_images_above_most_are_refused():
    with pytest.raises(UsageError, match="--min-images 9 is above --max-images 6; fix: lower one or raise the other"):
        InterleavedRules(min_images=9)


def test_pairs_take_the_sentence_after_an_image():
    with pytest.raises(UsageError, match="--variant pairs takes the sentence after an image, but --image-place after"):
        Options(recipe=Recipe(variant="pairs"), rules=InterleavedRules(image_place="after"))
    assert Options(recipe=Recipe(variant="pairs")).rules.image_place == "before"
