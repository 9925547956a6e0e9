"""A run that starts from the weights of a run with smaller images."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.checkpoint.load import load_weights
from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import CheckpointConfig, CheckpointError, ConfigError, ModelConfig
from megatron_vlm.config.modules import find_module
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model, tiny_run
from tests.support.jobs import start
from tests.support.micro_batches import make_micro_batch
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]
TABLE = "vision_model.position_embeddings.weight"
ROWS = [[0], [1], [2], [3]]
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def model_of(image_size: int, **changes) -> ModelConfig:
    """Return the tiny model for another image size: patches of 8 pixels."""
    model = tiny_model()
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=image_size, **changes))


def run_of(folder, image_size, load=None, parallel=None, precision="fp32", **vision):
    config = tiny_run(str(folder), model=model_of(image_size, **vision), parallel=parallel)
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, precision=precision),
        checkpoint=CheckpointConfig(load_weights=load and str(load)),
    )


def save(config) -> dict[str, torch.Tensor]:
    """Save the first checkpoint of a run and return its weights."""
    state = start(config)
    save_checkpoint(config, state.chunks, state.optimizer, state.progress())
    return {name: value.clone() for name, value in state.chunks[0].state_dict().items() if torch.is_tensor(value)}


@pytest.fixture
def small(one_rank, tmp_path):
    """A run with images of 32 pixels, and its weights."""
    folder = tmp_path / "small"
    return folder, save(run_of(folder, 32))


def interpolated(table, side, wanted, num_class_tokens=1):
    square = table[num_class_tokens:].view(side, side, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(square, (wanted, wanted), mode="bicubic", align_corners=False)[0]
    return torch.cat([table[:num_class_tokens], resized.permute(1, 2, 0).reshape(wanted * wanted, -1)])


@pytest.mark.parametrize("image_size", [48, 16])
def test_logits_equal_those_of_a_model_whose_positions_were_interpolated_by_hand(small, tmp_path, image_size):
    folder, weights = small
    model = model_of(image_size)
    (by_hand,) = build_model(model, tiny_run().parallel, Computation())
    by_hand.load_state_dict({**weights, TABLE: interpolated(weights[TABLE], 4, image_size // 8)}, strict=False)
    chunk = start(run_of(tmp_path / "other", image_size, load=folder)).chunks[0]
    arguments = make_micro_batch(model, num_images=2, num_text=20, num_labels=10).arguments
    arguments.update(labels=None, label_index=None)
    with torch.no_grad():
        assert torch.equal(chunk(**arguments), by_hand(**arguments))


def test_features_equal_those_of_clip_with_interpolated_positions(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, weights = small
    vision = model_of(32).vision
    reference = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_attention_heads,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    embeddings = reference.vision_model.embeddings
    tower = start(run_of(tmp_path / "other", 48, load=folder)).chunks[0].vision_model
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        embeddings.class_embedding.copy_(weights["vision_model.class_token"].flatten())
        embeddings.patch_embedding.weight.copy_(weights["vision_model.conv1.weight"])
        embeddings.position_embedding.weight.copy_(weights[TABLE])
        theirs = embeddings(pixels, interpolate_pos_encoding=True)
        ours = tower.conv1(pixels).flatten(2).transpose(1, 2)
        ours = torch.cat([tower.class_token.expand(2, -1, -1), ours], dim=1) + tower.position_embeddings(6, 6)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_table_is_rounded_once_after_its_interpolation(small, tmp_path, precision):
    folder, weights = small
    state = start(run_of(tmp_path / "other", 48, load=folder, precision=precision))
    table = state.chunks[0].vision_model.position_embeddings.weight
    assert torch.equal(table, interpolated(weights[TABLE], 4, 6).to(table.dtype))


def test_the_optimizer_starts_from_the_interpolated_table(small, tmp_path):
    state = start(run_of(tmp_path / "other", 48, load=small[0], precision="bf16"))
    masters = [value for group in state.optimizer.optimizer.param_groups for value in group["params"]]
    learning = sum(value.numel() for value in state.chunks[0].parameters() if value.requires_grad)
    assert sum(value.numel() for value in masters) == learning
    total = sum(value.float().sum() for value in state.chunks[0].parameters())
    torch.testing.assert_close(sum(value.sum() for value in masters), total, rtol=1e-3, atol=1e-2)


def test_the_log_names_the_table_and_both_shapes(small, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="megatron_vlm.checkpoint"):
        start(run_of(tmp_path / "other", 48, load=small[0]))
    (record,) = [record.message for record in caplog.records if "interpolated" in record.message]
    assert record == f"model.{TABLE} is interpolated for another image size, from [17, 36] to [37, 36]"


def test_nothing_is_said_of_weights_for_the_same_image_size(small, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="megatron_vlm.checkpoint"):
        start(run_of(tmp_path / "other", 32, load=small[0]))
    assert not caplog.records


def test_a_resumed_run_keeps_its_image_size(small):
    with pytest.raises(ConfigError, match=r"model.vision.image_size is 48, the run was trained with 32"):
        start(run_of(small[0], 48))


def test_weights_are_opened_at_their_own_image_size_only(small):
    (chunk,) = build_model(model_of(48), tiny_run().parallel, Computation())
    with pytest.raises(CheckpointError, match=rf"{TABLE} has shape \[17, 36\] in the checkpoint"):
        load_weights(str(small[0]), [chunk])


def test_a_run_with_an_adapter_takes_its_base_as_it_is(small, tmp_path, toy_parts):
    adapter = find_module("megatron_vlm.config.adapters", "beside_mlp", "model.adapter.type").Config(rank=3)
    config = run_of(tmp_path / "other", 48, load=small[0])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, adapter=adapter))
    with pytest.raises(CheckpointError, match=rf"{TABLE} has shape \[17, 36\] in the checkpoint"):
        start(config)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 16), ("hidden_size", 48), ("ffn_hidden_size", 80)])
def test_every_other_difference_of_shape_is_refused(small, tmp_path, name, value):
    with pytest.raises(ConfigError, match=rf"model\.vision\.{name} is {value}, the weights were trained with"):
        start(run_of(tmp_path / "other", 48, load=small[0], **{name: value}))


@pytest.mark.distributed
def test_every_layout_starts_from_the_same_table(workers, tmp_path):
    workers.run("tests.support.jobs:save_initial", 1, config=run_of(tmp_path / "small", 32))
    steps = [
        workers.run(
            "tests.support.jobs:train_steps",
            size,
            config=run_of(tmp_path / f"of_{size}", 48, load=tmp_path / "small", parallel=parallel),
            rows=ROWS,
            num_samples=4,
            num_steps=1,
        )[-1]
        for size, parallel in ((1, {}), (4, TP2_PP2))
    ]
    # float32: sums in another order
    assert steps[1].losses == pytest.approx(steps[0].losses, rel=1e-5)
    assert steps[1].grad_norms == pytest.approx(steps[0].grad_norms, rel=1e-5)
