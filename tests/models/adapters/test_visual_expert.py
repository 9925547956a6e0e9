"""A visual expert changes nothing for text, and computes image positions with its own weights."""

import dataclasses

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.config import ConfigError, ParallelConfig
from megatron_vlm.config.adapters.visual_expert import WEIGHTS, Config
from megatron_vlm.config.patterns import adapter_names
from megatron_vlm.costs.flops import Work, step_flops
from megatron_vlm.costs.parameters import stage_sizes
from megatron_vlm.models.adapters.visual_expert import apply, start
from megatron_vlm.models.build import build_model, is_of_adapter
from megatron_vlm.models.computation import Computation
from tests.support.configs import tiny_model, tiny_run
from tests.support.jobs import starting_from
from tests.support.micro_batches import make_micro_batch
from tests.support.overlap import OVERLAP

FREEZE = ("vision_model", "language_model")
# float32: the products of fewer rows may sum in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# Adam's first step divides each gradient by its size: it enlarges the rounding of the smallest.
AFTER_A_STEP = 1e-4
PP2 = {"pipeline_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def adapted_model():
    return dataclasses.replace(tiny_model(), adapter=Config())


def build(model, **computation):
    torch.manual_seed(0)
    return build_model(model, ParallelConfig(), Computation(**computation), FREEZE if model.adapter else ())[0]


@pytest.fixture
def pair(one_rank):
    """A model, and the same one with an expert that has learned something else."""
    base, adapted = build(tiny_model()), build(adapted_model())
    adapted.load_state_dict(base.state_dict(), strict=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if is_of_adapter(parameter):
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return base, adapted


def batch_of(num_images):
    return make_micro_batch(tiny_model(), num_images=num_images, num_text=40, num_labels=20)


@pytest.mark.parametrize("autograd", [True, False])
def test_text_alone_gives_the_bits_of_the_base(pair, autograd):
    base, adapted = pair
    with torch.set_grad_enabled(autograd):
        assert torch.equal(adapted(**batch_of(0).arguments), base(**batch_of(0).arguments))
        assert not torch.equal(adapted(**batch_of(2).arguments), base(**batch_of(2).arguments))


def test_an_expert_that_starts_is_the_base(pair):
    base, adapted = pair
    start(Config(), adapted)
    torch.testing.assert_close(adapted(**batch_of(2).arguments), base(**batch_of(2).arguments), **TOLERANCE)


def test_images_alone_are_processed_by_a_decoder_of_the_experts_weights(pair):
    base, adapted = pair
    with torch.no_grad():
        for layer, source in zip(
            base.language_model.decoder.layers, adapted.language_model.decoder.layers, strict=True
        ):
            for linear, name in zip(
                (
                    layer.self_attention.linear_qkv,
                    layer.self_attention.linear_proj,
                    layer.mlp.linear_fc1,
                    layer.mlp.linear_fc2,
                ),
                WEIGHTS,
                strict=True,
            ):
                linear.weight.copy_(getattr(source.expert, name))
        hidden = torch.randn(24, 2, 64)
        ours = adapted.language_model(hidden.clone(), image_token_index=torch.arange(48))
        theirs = base.language_model(hidden.clone())
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("num_images", [0, 2])
def test_experts_and_projection_learn_and_nothing_else(one_rank, num_images, recompute):
    adapted = build(adapted_model(), recompute=recompute)
    adapted(**batch_of(num_images).arguments).sum().backward()
    names = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    experts = set(adapter_names(adapted_model()))
    assert names == experts | {name for name, _ in adapted.named_parameters() if "projection" in name}
    gradient = dict(adapted.named_parameters())["language_model.decoder.layers.0.expert.linear_qkv"].grad
    assert bool(gradient.any()) == bool(num_images)


def test_generation_with_a_cache_equals_the_whole_sequence(pair):
    _, adapted = pair
    language, hidden = adapted.language_model.eval(), torch.randn(20, 2, 64)
    index = torch.tensor([3, 4, 5, 6, 7, 12, 13])  # positions of two sequences, which lie side by side
    with torch.no_grad():
        whole = language(hidden.clone(), image_token_index=index)
        context = StaticInferenceContext(2, 20)
        cached = [language(hidden[:10].clone(), image_token_index=index, inference_context=context)[:, -1]]
        context.increment_sequence_len_offset(10)
        context.enable_decode_mode()
        for position in range(10, 20):
            step = language(hidden[position : position + 1].clone(), inference_context=context)
            cached.append(step[:, -1])
            context.increment_sequence_len_offset(1)
    torch.testing.assert_close(torch.stack(cached, dim=1), whole[:, 9:], **TOLERANCE)


def test_parameters_and_operations_are_those_of_a_real_step(one_rank):
    model, batch = adapted_model(), batch_of(3)
    adapted = build(model)
    config = tiny_run(model=model, training={"freeze": FREEZE})
    (size,) = stage_sizes(config)
    assert size.parameters == sum(parameter.numel() for parameter in adapted.parameters())
    assert size.learning == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        adapted(**batch.arguments).sum().backward()
    work = Work(
        num_tokens=batch.num_tokens,
        attention_pairs=batch.num_tokens**2,
        num_labels=batch.num_labels,
        num_images=batch.num_images,
    )
    # Gradients of the projection's input are computed although the tower rests.
    assert step_flops(model, FREEZE, work).total == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_fp8_is_refused(one_rank):
    adapted = build(tiny_model())
    adapted.config.fp8 = "hybrid"
    with pytest.raises(ConfigError, match=r"visual_expert cannot compute in FP8 \(training.fp8\); fix: remove one"):
        apply(Config(), adapted)


@pytest.fixture(scope="module")
def initial(workers, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("initial"))
    workers.run("tests.support.jobs:save_initial", 1, config=tiny_run(run_dir))
    return run_dir


ROWS = [[0, 1, 2], [8, 9], [3], [10, 4], [5, 6], [7], [11], [1, 12]]


def run(workers, initial, run_dir, parallel, world_size, num_steps, **training):
    config = tiny_run(str(run_dir), model=adapted_model(), parallel=parallel, training={"freeze": FREEZE, **training})
    return workers.run(
        "tests.support.jobs:train_steps",
        world_size,
        config=starting_from(config, initial),
        rows=ROWS,
        num_samples=16,
        num_steps=num_steps,
        save=num_steps == 1,
    )[0]


@pytest.fixture(scope="module")
def reference(workers, initial):
    return run(workers, initial, "unused", {}, 1, 2)


@pytest.mark.distributed
def test_weights_that_are_gathered_while_ranks_compute_are_there_in_time(workers, initial, reference):
    steps = run(workers, initial, "unused", OVERLAP, 2, 2)
    assert steps.losses == pytest.approx(reference.losses, rel=1e-5)
    assert steps.grad_norms == pytest.approx(reference.grad_norms, rel=AFTER_A_STEP)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("parallel", "world_size", "recompute"),
    [
        pytest.param({"tensor_model_parallel_size": 2}, 2, "none", marks=pytest.mark.slow),
        ({**TP2_SP, **PP2}, 4, "full"),
        (TP2_SP, 4, "none"),
        ({**PP2, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}, 2, "full"),
    ],
    ids=["tp2", "tp2_pp2_sp", "tp2_dp2_sp", "vpp2"],
)
def test_every_layout_equals_one_rank_also_when_it_is_resumed(
    workers, initial, reference, parallel, world_size, recompute, tmp_path
):
    first = run(workers, initial, tmp_path, parallel, world_size, 1, recompute=recompute)
    second = run(workers, initial, tmp_path, {}, 1, 1)
    assert first.losses + second.losses == pytest.approx(reference.losses, rel=1e-5)
    assert first.grad_norms == pytest.approx(reference.grad_norms[:1], rel=1e-5)
    assert second.grad_norms == pytest.approx(reference.grad_norms[1:], rel=AFTER_A_STEP)
