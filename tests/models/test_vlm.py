import dataclasses

import pytest
import torch

from megatron_vlm.config import ModelConfig, ParallelConfig
from megatron_vlm.config.modules import find_module
from megatron_vlm.config.projectors import make_projector
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.vlm import merge_image_embeddings
from tests.support.configs import tiny_model
from tests.support.micro_batches import make_micro_batch
from tests.support.parts import PROJECTOR_NAMES, TOWER_NAMES, tiny_model_of
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]
MODEL = tiny_model()


@pytest.fixture
def model(one_rank):
    return build_model(MODEL, ParallelConfig(), Computation())[0].eval()


def test_images_are_written_at_their_places_and_nowhere_else():
    text = torch.arange(12.0).view(6, 1, 2)
    image = torch.tensor([[100.0, 101.0], [102.0, 103.0]])
    merged = merge_image_embeddings(text, image, torch.tensor([4, 1]))
    assert merged[:, 0, 0].tolist() == [0.0, 102.0, 4.0, 6.0, 100.0, 10.0]
    assert text[4, 0, 0] == 8.0


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ValueError, match="text has hidden_size 2, image 3"):
        merge_image_embeddings(torch.zeros(4, 1, 2), torch.zeros(1, 3), torch.tensor([0]))


def test_embeddings_without_a_place_are_refused():
    with pytest.raises(ValueError, match="2 image embeddings for 1 placeholders"):
        merge_image_embeddings(torch.zeros(4, 1, 2), torch.zeros(2, 2), torch.tensor([0]))


def logits(model, arguments):
    with torch.no_grad():
        return model(**{**arguments, "labels": None, "label_index": None})[0]


def test_the_order_of_the_images_matters_and_their_storage_does_not(model):
    arguments = make_micro_batch(MODEL, num_images=2, num_text=12, num_labels=4).arguments
    swapped = {**arguments, "pixel_values": arguments["pixel_values"].flip(0)}
    tokens = arguments["image_token_index"].numel() // 2
    index = torch.cat([arguments["image_token_index"][tokens:], arguments["image_token_index"][:tokens]])
    expected = logits(model, arguments)
    assert (expected - logits(model, swapped))[-12:].abs().max() > 1e-4
    # Stored the other way round, each at its own placeholders: the same sequence.
    torch.testing.assert_close(expected, logits(model, {**swapped, "image_token_index": index}), rtol=1e-4, atol=1e-5)


def test_what_stands_under_an_image_is_not_read(model):
    arguments = make_micro_batch(MODEL, num_images=1, num_text=12, num_labels=4).arguments
    other = arguments["input_ids"].clone()
    other[0, arguments["image_token_index"]] = 5
    assert torch.equal(logits(model, arguments), logits(model, {**arguments, "input_ids": other}))


def test_a_micro_batch_without_images_gives_the_vision_parts_gradients_of_zero(model):
    arguments = make_micro_batch(MODEL, num_images=0, num_text=20, num_labels=8).arguments
    model(**arguments).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().max() == 0) == name.startswith(("vision_model", "vision_projection")), name


def test_a_rank_without_images_of_its_own_encodes_none(model):
    empty = torch.empty((0, 3, 32, 32), dtype=torch.uint8)
    # Of one rank every image is its own; what others encode is gathered, here nothing.
    assert model.encode_images(empty, 0).shape == (0, MODEL.language.hidden_size)


def let_weights_arrive_late(model: torch.nn.Module) -> None:
    """Take the weights away; each module gets those that it holds when it is called, as megatron-core gathers them."""
    weights = {parameter: parameter.detach().clone() for parameter in model.parameters()}

    def arrive(module, _):
        for parameter in module.parameters(recurse=False):
            parameter.data.copy_(weights[parameter])

    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    for module in model.modules():
        module.register_forward_pre_hook(arrive)


def assert_weights_may_arrive_late(config: ModelConfig, num_images: int) -> None:
    (model,) = build_model(config, ParallelConfig(), Computation())
    arguments = make_micro_batch(config, num_images=num_images, num_text=20, num_labels=8).arguments
    expected = model(**arguments)
    let_weights_arrive_late(model)
    assert torch.equal(model(**arguments), expected)
    assert [name for name, parameter in model.named_parameters() if parameter.isnan().any()] == []


@pytest.mark.parametrize("num_images", [0, 2])
@pytest.mark.parametrize(
    ("tower", "projector"),
    [
        *((tower, "linear") for tower in TOWER_NAMES),
        *(("clip", projector) for projector in PROJECTOR_NAMES if projector != "linear"),
    ],
)
def test_every_module_is_called_before_its_weights_are_used(one_rank, tower, projector, num_images):
    assert_weights_may_arrive_late(tiny_model_of(tower, projector), num_images)


@pytest.mark.parametrize("num_images", [0, 2])
def test_so_are_the_modules_of_parts_outside_the_tree(one_rank, toy_parts, num_images):
    adapter = find_module("megatron_vlm.config.adapters", "beside_mlp", "model.adapter.type").Config(rank=3)
    model = dataclasses.replace(MODEL, projection=make_projector("pixel_shuffle"), adapter=adapter)
    assert_weights_may_arrive_late(model, num_images)
