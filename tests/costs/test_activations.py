"""Activations that we count, against those that autograd keeps in a real forward pass."""

import dataclasses
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_vlm.config import PART_NAMES, ParallelConfig
from megatron_vlm.config.adapters.visual_expert import Config as VisualExpert
from megatron_vlm.config.language import LanguageConfig, TensorSplit
from megatron_vlm.costs.activations import chunks_in_flight, stage_activations
from megatron_vlm.costs.flops import Work
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.parallel.groups import build_groups
from tests.support.configs import SEQ_LENGTH, tiny_model, tiny_model_with_tower, tiny_run
from tests.support.micro_batches import make_micro_batch
from tests.support.parts import PROJECTOR_NAMES, tiny_projector
from tests.support.vision_towers import TINY

LAYERS = "language_model.decoder.layers"
FROZEN_BELOW = ("vision_model", "vision_projection", "language_model.embedding")
FLOAT = 4
# Not counted: per token and head the normaliser of attention, per token two numbers of each norm.
TOLERANCE = 0.03
HEAD = 64


@pytest.fixture
def gpu_layers(monkeypatch):
    """Let the layers keep on the CPU what they keep on a GPU: SwiGLU and RMSNorm their inputs only."""
    monkeypatch.setattr(
        torch.nn.RMSNorm, "forward", lambda self, x: F.layer_norm(x, self.normalized_shape, self.weight)
    )
    torch.compiler.set_stance("force_eager")
    yield lambda chunk: setattr(chunk.config, "bias_activation_fusion", True)
    torch.compiler.set_stance("default")


def wide_model(groups=2, **changes):
    """Return a model whose heads are wide, as in a real one."""
    model = tiny_model(
        hidden_size=128, ffn_hidden_size=320, num_attention_heads=4, kv_channels=HEAD, num_query_groups=groups
    )
    vision = dataclasses.replace(model.vision, hidden_size=128, ffn_hidden_size=320, num_attention_heads=2)
    return dataclasses.replace(model, vision=dataclasses.replace(vision, **changes))


def kept_bytes(run, module):
    """Return the bytes that autograd keeps for the backward pass of `run()`, beside the weights of `module`.

    Tables of rotary embeddings are left out: on a GPU, all layers share one.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    packed = []

    def pack(tensor):
        is_table = tensor.shape[1:] == (1, 1, 2 * HEAD) and not tensor.requires_grad
        if tensor.untyped_storage()._cdata not in weights and tensor.is_floating_point() and not is_table:
            # Some are let go again: megatron-core records the last sums of a layer even where it will compute it again.
            packed.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    kept = [tensor.untyped_storage() for reference in packed if (tensor := reference()) is not None]
    del output
    return sum({storage._cdata: storage.nbytes() for storage in kept}.values())


def assert_a_stage_keeps_what_is_counted(model, freeze, recompute, gpu_layers):
    config = tiny_run(model=model, training={"freeze": freeze, "recompute": recompute})
    batch = make_micro_batch(model, num_images=6, num_text=96, num_labels=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=batch.num_tokens))
    (chunk,) = build_model(model, config.parallel, Computation(recompute=recompute), freeze)
    gpu_layers(chunk)
    work = Work(num_tokens=batch.num_tokens, attention_pairs=0, num_labels=2, num_images=6)
    expected = FLOAT * stage_activations(config, 0, work, "torch").kept
    arguments = {**batch.arguments, "packed_seq_params": None}
    assert kept_bytes(lambda: chunk(**arguments), chunk) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("groups", "freeze", "recompute"),
    [
        (1, ("vision_model",), "none"),
        (2, ("vision_model",), "none"),
        (4, ("vision_model",), "none"),
        (4, ("vision_model",), "full"),
        (2, ("vision_model", "language_model"), "none"),
        (2, ("vision_model", "language_model"), "full"),
        (2, (), "none"),
        (2, (), "full"),
        (2, ("vision_model", "*.mlp.linear_fc1", "*.linear_qkv"), "none"),
        (2, ("vision_model", f"{LAYERS}.[0-2]"), "none"),
        (2, (*FROZEN_BELOW, f"{LAYERS}.[0-2]"), "none"),
        (2, (*FROZEN_BELOW, f"{LAYERS}.[0-1]"), "full"),
        (2, (*FROZEN_BELOW, LAYERS), "none"),
    ],
)
def test_a_stage_keeps_what_autograd_keeps(groups, freeze, recompute, gpu_layers, one_rank):
    model = wide_model(groups)
    assert_a_stage_keeps_what_is_counted(model, freeze, recompute, gpu_layers)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_visual_expert_keeps_what_autograd_keeps(recompute, gpu_layers, one_rank):
    model, freeze = dataclasses.replace(wide_model(), adapter=VisualExpert()), ("vision_model", "language_model")
    assert_a_stage_keeps_what_is_counted(model, freeze, recompute, gpu_layers)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("type", "settings"), [("clip", {"activation": "gelu"}), *TINY])
def test_a_trained_tower_keeps_what_autograd_keeps(type, settings, recompute, one_rank):
    wide = {"hidden_size": 128, "ffn_hidden_size": 320, "num_attention_heads": 2}
    model = tiny_model_with_tower(type, **wide, **settings)
    (chunk,) = build_model(model, tiny_run().parallel, Computation(recompute=recompute), ())
    pixels = torch.rand(4, 3, model.vision.image_size, model.vision.image_size)
    found = kept_bytes(lambda: chunk.vision_model(pixels), chunk.vision_model)
    grid = model.vision.constant_grid
    counted = model.vision.activations(grid, learns=True, recompute=recompute == "full").times(4).kept
    assert found == pytest.approx(FLOAT * counted, rel=TOLERANCE)


def kept_by_split_towers() -> list[tuple[int, float]]:
    """Return what autograd keeps of each tower on one of two ranks, and what is counted."""
    parallel, found = ParallelConfig(tensor_model_parallel_size=2, vision_tensor_parallel=True), []
    build_groups(parallel)
    for type, settings in TINY:
        # Two heads a rank: one would be normalised where it lies, without the copy that is counted.
        wide = {"hidden_size": 128, "ffn_hidden_size": 320, "num_attention_heads": 4}
        vision = (model := tiny_model_with_tower(type, **wide, **settings)).vision
        (chunk,) = build_model(model, parallel, Computation(), ())
        pixels = torch.rand(4, 3, vision.image_size, vision.image_size)
        kept = kept_bytes(partial(chunk.vision_model, pixels), chunk.vision_model)
        counted = vision.activations(vision.constant_grid, learns=True, recompute=False, tensor_parallel_size=2)
        found.append((kept, FLOAT * counted.times(4).kept))
    return found


@pytest.mark.distributed
def test_a_rank_of_a_split_tower_keeps_what_autograd_keeps(workers):
    for kept, counted in workers.run("tests.costs.test_activations:kept_by_split_towers", 2)[0]:
        assert kept == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("type", PROJECTOR_NAMES)
def test_a_projection_keeps_what_autograd_keeps(type, learns, one_rank):
    model = dataclasses.replace(wide_model(), projection=tiny_projector(type))
    (chunk,) = build_model(model, tiny_run().parallel, Computation(), () if learns else ("vision_projection",))
    features = torch.rand(4, 16, 128).requires_grad_()
    found = kept_bytes(lambda: chunk.vision_projection(features), chunk.vision_projection)
    counted = model.projection.activations(model.vision.constant_grid, 128, 128, learns=learns).times(4).kept
    assert found == pytest.approx(FLOAT * counted, rel=TOLERANCE)


def test_queries_and_keys_that_are_rotated_in_place_are_kept_once():
    language, split = wide_model(groups=4).language, TensorSplit(size=2)
    kept = [
        language.layer_activations(10, split, learning=(True,) * 4, rotates_in_place=place).kept
        for place in (False, True)
    ]
    assert kept[0] - kept[1] == 10 * (256 + 256) / 2


def test_the_output_layer_holds_logits_in_bf16_and_fp32():
    language = LanguageConfig(vocab_size=126, num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    held = language.output_activations(20, 10, TensorSplit(size=2, sequence_parallel=True))
    assert (held.kept, held.working) == ((10 + 10) * 8, 3 * 10 * 64)


@pytest.mark.parametrize(
    ("pp", "chunks", "stage", "expected"),
    [
        (1, None, 0, 1),
        (4, None, 0, 4),
        (4, None, 3, 1),
        # 2 * 3 + 4 passes to warm up, and one more
        (4, 2, 0, 11),
        (4, 2, 3, 5),
    ],
)
def test_passes_in_flight_are_those_of_the_schedule(pp, chunks, stage, expected):
    parallel = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": chunks}
    moments = chunks_in_flight(tiny_run(parallel=parallel).parallel, stage, 100)
    assert {sum(counts) for counts in moments} == {expected}


@pytest.mark.parametrize(("chunks", "expected"), [(None, (2,)), (2, (2, 2))])
def test_no_more_micro_batches_are_in_flight_than_there_are(chunks, expected):
    parallel = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": chunks}
    assert chunks_in_flight(tiny_run(parallel=parallel).parallel, 0, 2) == {expected}


@pytest.mark.parametrize(("pp", "chunks"), [(2, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("num_groups", [1, 2, 5, 9])
def test_chunks_in_flight_are_those_of_megatron_cores_order(pp, chunks, num_groups):
    """Played pass by pass: a forward pass of the table, and behind the warm-up a backward pass after each."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=chunks, overlap_p2p_comm=True
    )
    table = get_schedule_table(num_groups * pp, chunks, pp)
    for stage in range(pp):
        warm_up = min(2 * (pp - stage - 1) + (chunks - 1) * pp, len(table))
        held, fullest, begun = Counter(), set(), len(table) == warm_up
        for number, (_, chunk) in enumerate(table):
            held[chunk] += 1
            if number >= warm_up or (begun and number == len(table) - 1):
                fullest.add(tuple(held[chunk] for chunk in range(chunks)))
            if number >= warm_up:
                held[chunks - 1 - table[number - warm_up][1]] -= 1
        assert chunks_in_flight(parallel, stage, num_groups * pp) == fullest


def test_a_stage_with_most_layers_in_its_first_chunk_keeps_more():
    def kept(layout):
        parallel = {
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": layout,
            "overlap_p2p_comm": True,
        }
        config = tiny_run(parallel=parallel, model=tiny_model(num_layers=8), training={"freeze": PART_NAMES[:2]})
        work = Work(num_tokens=SEQ_LENGTH, attention_pairs=0, num_labels=0, num_images=0)
        return stage_activations(config, 0, work, "torch", num_micro_batches=8).kept

    # 4 passes of the first chunk and 1 of the second, or the other way round 3 and 2, all through layers of one kind.
    first, last = kept("Et*3|t*2|t|t*2L"), kept("Et|t*2|t*3|t*2L")
    one = kept("Et|t*3|t|t*3L") / 5
    assert (first, last) == pytest.approx((13 * one, 9 * one))


def test_vision_parts_that_rest_keep_only_the_embeddings_in_their_rows():
    config = tiny_run(training={"freeze": PART_NAMES[:2]})
    images, text = (
        stage_activations(config, 0, Work(num_tokens=0, attention_pairs=0, num_labels=0, num_images=n), "torch").kept
        for n in (3, 0)
    )
    assert images - text == 3 * 16 * 64
