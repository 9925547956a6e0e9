"""LoRA on one rank: it begins as nothing, and only it learns. What it computes is in tests/convert/adapters."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.config import ParallelConfig
from megatron_vlm.config.adapters.lora import TARGETS, Config
from megatron_vlm.config.inference import SamplingOptions
from megatron_vlm.evaluation.answer import Generator, Prompt
from megatron_vlm.models.adapters import lora
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.parallel.groups import seed_everything
from tests.support.configs import tiny_model, tiny_run
from tests.support.jobs import save_initial, start, train_steps
from tests.support.lora_runs import ADAPTER, NUM_SAMPLES, ROWS, lora_model, lora_run
from tests.support.micro_batches import make_micro_batch


@pytest.fixture
def base(one_rank, tmp_path):
    """A run folder with a checkpoint of random weights."""
    config = tiny_run(str(tmp_path / "base"))
    save_initial(config)
    return config.run_dir


def train(config, num_steps, save=False):
    return train_steps(config, ROWS, num_samples=NUM_SAMPLES, num_steps=num_steps, save=save)


def build(model, computation=None):
    seed_everything(7)
    (chunk,) = build_model(model, ParallelConfig(), computation or Computation())
    return chunk


def weights(state):
    return {name: weight.detach().clone() for name, weight in state.chunks[0].named_parameters()}


def test_a_new_pair_changes_no_bit(one_rank):
    plain, adapted = build(tiny_model()), build(lora_model())
    arguments = make_micro_batch(tiny_model(), num_images=2, num_text=20, num_labels=8).arguments
    assert torch.equal(adapted(**arguments), plain(**arguments))


@pytest.mark.parametrize("targets", [("linear_qkv",), ("linear_proj", "linear_fc2"), TARGETS])
def test_the_targets_get_pairs_and_no_other_layer_does(one_rank, targets):
    chunk = build(lora_model(dataclasses.replace(ADAPTER, targets=targets)))
    found = {name.split(".lora.")[1].split(".")[0] for name, _ in chunk.named_parameters() if ".lora." in name}
    assert found == set(targets)


def test_a_is_drawn_as_torch_draws_linear_layers(one_rank):
    chunk = build(lora_model(dataclasses.replace(ADAPTER, rank=64)))
    pairs = chunk.language_model.decoder.layers[0].lora
    drawn = torch.cat([pairs.linear_qkv.a.flatten(), pairs.linear_fc1.a.flatten()])
    bound = 64**-0.5  # 1 / sqrt(inputs)
    assert drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    layers = [layer.lora.linear_qkv.a for layer in chunk.language_model.decoder.layers]
    assert not torch.equal(layers[0], layers[1])


def test_single_targets_have_ranks_of_their_own(one_rank):
    pairs = (
        build(lora_model(dataclasses.replace(ADAPTER, ranks={"linear_qkv": 12}))).language_model.decoder.layers[0].lora
    )
    assert (pairs.linear_qkv.a.size(0), pairs.linear_qkv.b.size(1), pairs.linear_proj.a.size(0)) == (12, 12, 4)
    assert pairs.linear_qkv.scale == pairs.linear_proj.scale == 2.0


def test_only_the_pairs_and_the_projection_learn(base, tmp_path):
    config = lora_run(tmp_path / "run", base)
    before, after = weights(start(config)), None
    steps = train(config, 3, save=True)
    assert steps.losses[2] < steps.losses[0]
    after = weights(start(config))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".lora." in name or name.startswith("vision_projection.")
    }


def test_checkpoint_and_optimizer_hold_only_them(base, tmp_path):
    from megatron.core import dist_checkpointing

    config = lora_run(tmp_path / "run", base)
    train(config, 1, save=True)
    keys = dist_checkpointing.load_tensors_metadata(str(find_checkpoint(config.run_dir)))
    assert all(".lora." in key or ".vision_projection." in key for key in keys)
    assert "optimizer.state.exp_avg.model.language_model.decoder.layers.0.lora.linear_fc1.b" in keys


def test_a_resumed_run_drops_the_same_inputs(base, tmp_path):
    model = lora_model(dataclasses.replace(ADAPTER, dropout=0.3))
    whole = train(lora_run(tmp_path / "whole", base, model=model), 4)
    config = lora_run(tmp_path / "run", base, model=model)
    train(config, 2, save=True)
    resumed = train(config, 2)
    assert (resumed.losses, resumed.grad_norms) == (whole.losses[2:], whole.grad_norms[2:])
    without = train(lora_run(tmp_path / "without", base), 4)
    assert without.losses[1:] != whole.losses[1:]


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_layers_drop_the_same_inputs(base, tmp_path, recompute):
    model = lora_model(dataclasses.replace(ADAPTER, dropout=0.3))
    expected = train(lora_run(tmp_path / "kept", base, model=model), 2)
    found = train(lora_run(tmp_path / recompute, base, model=model, recompute=recompute), 2)
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)


def test_nothing_is_dropped_in_evaluation(one_rank):
    chunk = build(lora_model(Config(rank=4, dropout=0.5)))
    for name, weight in chunk.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(weight)
    arguments = make_micro_batch(tiny_model(), num_images=1, num_text=20, num_labels=8).arguments
    assert not torch.equal(chunk(**arguments), chunk(**arguments))
    chunk.eval()
    assert torch.equal(chunk(**arguments), chunk(**arguments))


@torch.no_grad()
def test_answers_with_a_cache_are_those_without_one(one_rank):
    model = lora_model(ADAPTER, init_method_std=0.4)
    chunk = build(model).eval()
    for name, weight in chunk.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(weight)
    ids, pixels = [1, 7, 8], torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    generator = Generator(chunk, model, stop_ids=[2])
    prompt = Prompt(np.array(ids, dtype=np.int64), ())
    (answer,) = generator.generate([prompt], generator.encode_images(pixels.numpy()), SamplingOptions(max_new_tokens=6))
    for _ in range(len(answer.ids)):
        logits = chunk(torch.tensor([ids]), pixels, torch.zeros(0, dtype=torch.int64), num_images=0)
        ids.append(int(logits[0, -1, : model.language.vocab_size].argmax()))
    assert list(answer.ids) == ids[3:]


def test_a_run_in_bf16_learns_in_bf16(base, tmp_path):
    config = lora_run(tmp_path / "run", base, precision="bf16")
    steps = train(config, 3, save=True)
    assert steps.losses[2] < steps.losses[0]
    state = start(config)
    assert {weight.dtype for weight in state.chunks[0].parameters()} == {torch.bfloat16}
    assert all(weight.any() for name, weight in state.chunks[0].named_parameters() if ".lora." in name)


def test_behind_a_fused_norm_the_pair_gets_the_normed_input(one_rank):
    """transformer-engine's LayerNormLinear returns what is between norm and product, if it is asked to."""

    class NormLinear(torch.nn.Linear):
        return_layernorm_output = False

        def forward(self, x):
            assert self.return_layernorm_output
            return (super().forward(2 * x), 2 * x), None

    linear, x = NormLinear(6, 5, bias=False), torch.randn(3, 1, 6)
    settings = SimpleNamespace(
        params_dtype=torch.float32, sequence_parallel=False, gated_linear_unit=True, init_model_with_meta_device=False
    )
    group = torch.distributed.group.WORLD
    pair = lora.ColumnPair(ADAPTER, settings, linear.weight, group, target="linear_qkv", seed=1)
    torch.nn.init.normal_(pair.b)
    lora._hook(linear, pair)
    output, bias = linear(x)
    expected = 2 * x @ linear.weight.t() + 2.0 * (2 * x @ pair.a.t() @ pair.b.t())
    assert bias is None
    torch.testing.assert_close(output, expected)
