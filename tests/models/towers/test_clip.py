import pytest
import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model


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
