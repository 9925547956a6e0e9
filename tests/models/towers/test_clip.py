import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model


@pytest.fixture
def tower(one_rank):
    return build_model(tiny_model(), ParallelConfig(), Computation())[0].vision_model.eval()


def test_changing_the_last_patch_changes_every_patch_feature(tower):
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    other = pixels.clone()
    other[..., -8:, -8:] = 255 - other[..., -8:, -8:]
    with torch.no_grad():
        changed = (tower(pixels) - tower(other)).abs().amax(dim=-1)[0]
    assert changed.shape == (16,)
    assert changed.min() > 1e-6


def test_uint8_pixels_equal_pixels_normalised_by_hand(tower):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor(tower.vision_config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(tower.vision_config.image_std).view(1, 3, 1, 1)
    with torch.no_grad():
        # float32 rounding of (x - 255 m) / (255 s) against (x / 255 - m) / s
        torch.testing.assert_close(tower(pixels), tower((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-5)


def test_normalisation_of_a_bf16_model_is_not_rounded(one_rank):
    tower = build_model(tiny_model(), ParallelConfig(), Computation(precision="bf16"))[0].vision_model
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    mean = torch.tensor(tower.vision_config.image_mean).view(1, 3, 1, 1) * 255
    std = torch.tensor(tower.vision_config.image_std).view(1, 3, 1, 1) * 255
    assert torch.equal(tower.bfloat16().normalise(pixels), ((pixels.float() - mean) / std).bfloat16())


def test_another_image_size_interpolates_the_positions(tower):
    pixels = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        assert tower(pixels).shape == (1, 36, 36)


def test_patches_are_read_row_by_row(tower):
    pixels = torch.zeros(1, 3, 16, 32)
    pixels[..., 8:16, 16:24] = 1.0  # second row, third column of a 2 x 4 grid
    with torch.no_grad():
        patches = tower.conv1(pixels).flatten(2).transpose(1, 2)[0]
    assert patches.abs().amax(dim=-1).nonzero().flatten().tolist() == [1 * 4 + 2]


def test_interpolated_positions_keep_rows_and_columns_apart(tower):
    with torch.no_grad():
        weight = tower.position_embeddings.weight
        weight[0] = 0.0
        weight[1:] = torch.arange(4.0).repeat_interleave(4)[:, None]  # the row number of every patch
        same, other = tower.position_embeddings(4, 4), tower.position_embeddings(2, 8)
    assert torch.equal(same, weight)
    rows = other[1:, 0].view(2, 8)
    torch.testing.assert_close(rows, rows[:, :1].expand(2, 8))  # alike along a row
    assert rows[0, 0] < rows[1, 0]


def test_images_of_a_batch_do_not_see_each_other(tower):
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        together = tower(pixels)
        # A batch of another size may sum in another order: float32.
        torch.testing.assert_close(together[1:2], tower(pixels[1:2]), rtol=1e-4, atol=1e-5)


def test_tower_equals_hugging_face_clip(one_rank):
    transformers = pytest.importorskip("transformers")
    model = tiny_model()
    tower = build_model(model, ParallelConfig(), Computation())[0].vision_model.eval()
    vision = model.vision
    reference = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.ffn_hidden_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        )
    ).eval()
    _copy_clip(tower, reference.state_dict())
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[vision.feature_layer][:, 1:]
        # the same products in the same order but for the fused query, key and value: float32 rounding
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)


def _copy_clip(tower, source):
    source = {key.removeprefix("vision_model."): value for key, value in source.items()}
    heads = tower.vision_config.num_attention_heads
    target = tower.state_dict()
    target["conv1.weight"] = source["embeddings.patch_embedding.weight"]
    target["position_embeddings.weight"] = source["embeddings.position_embedding.weight"]
    target["class_token"] = source["embeddings.class_embedding"].view(1, 1, -1)
    for kind in ("weight", "bias"):
        target[f"ln_pre.{kind}"] = source[f"pre_layrnorm.{kind}"]
    for index in range(tower.vision_config.num_layers_run):
        ours, theirs = f"decoder.layers.{index}.", f"encoder.layers.{index}."
        for kind in ("weight", "bias"):
            parts = [source[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
            target[f"{ours}self_attention.linear_qkv.{kind}"] = torch.cat(split, 1).flatten(0, 1)
            for name, other in (
                ("self_attention.linear_proj", "self_attn.out_proj"),
                ("mlp.linear_fc1", "mlp.fc1"),
                ("mlp.linear_fc2", "mlp.fc2"),
                ("input_layernorm", "layer_norm1"),
                ("pre_mlp_layernorm", "layer_norm2"),
            ):
                target[f"{ours}{name}.{kind}"] = source[f"{theirs}{other}.{kind}"]
    tower.load_state_dict(target)
