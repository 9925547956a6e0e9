import dataclasses

import pytest

from megatron_vlm.config import PART_NAMES
from megatron_vlm.costs.cluster import Cluster
from megatron_vlm.costs.flops import step_flops
from megatron_vlm.costs.rows import pairs, text
from megatron_vlm.costs.stage_time import Times, micro_batch_times
from tests.support.configs import tiny_run
from tests.support.toy_parts import toy_parts

__all__ = ["toy_parts"]

A100 = Cluster(gpu_name="A100")
IMAGES = dataclasses.replace(pairs(tiny_run()), num_images=8)


def run_of(tp=1, pp=1, freeze=(), recompute="none", **parallel):
    return tiny_run(
        parallel={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **parallel},
        training={"freeze": freeze, "recompute": recompute, "global_batch_size": 8},
    )


def passes(config, stage=0, work=None, world_size=None):
    size = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    return micro_batch_times(config, stage, work or pairs(config), A100, world_size or size)


def test_no_pass_is_faster_than_its_operations_at_the_peak():
    config = run_of()
    forward, backward = passes(config)
    flops = step_flops(config.model, (), pairs(config)).total
    assert forward.total + backward.total > flops / A100.gpu.peak_flops


def test_images_cost_time_in_the_tower_only_on_the_first_stage():
    config = run_of(pp=2)
    first, last = (passes(config, stage)[0] for stage in (0, 1))
    assert first.tower > 0
    assert last.tower == 0
    assert passes(config, 0, text(config))[0].tower == 0


def test_a_frozen_tower_has_no_backward_pass_and_a_trained_one_has():
    assert passes(run_of(freeze=("vision_model", "vision_projection")))[1].tower == 0
    projection = passes(run_of(freeze=("vision_model",)))[1].tower
    assert 0 < projection < passes(run_of())[1].tower


def test_ranks_of_a_split_tower_share_its_products_and_exchange_its_outputs():
    whole, split = (passes(run_of(tp=2, vision_tensor_parallel=on), work=IMAGES) for on in (False, True))
    for one, other in zip(whole, split, strict=True):
        # The projection, which both compute for all images, is the difference.
        assert one.tower < other.tower < 1.5 * one.tower
        assert other.tensor_parallel > one.tensor_parallel
    frozen = run_of(tp=2, vision_tensor_parallel=True, freeze=("vision_model", "vision_projection"))
    assert passes(frozen, work=IMAGES)[1].tensor_parallel < split[1].tensor_parallel


def test_a_frozen_decoder_needs_no_gradients_of_weights():
    whole, frozen = passes(run_of())[1], passes(run_of(freeze=("language_model",)))[1]
    assert frozen.products < whole.products
    assert frozen.memory < whole.memory


def test_full_recomputation_repeats_the_layers_and_selective_the_attention():
    plain, full, selective = (passes(run_of(recompute=kind)) for kind in ("none", "full", "selective"))
    assert full[0] == selective[0] == plain[0]
    assert full[1].products > plain[1].products
    assert selective[1] == dataclasses.replace(plain[1], attention=plain[1].attention + plain[0].attention)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel_ranks_share_the_products_and_exchange(sequence_parallel):
    one, two = passes(run_of())[0], passes(run_of(tp=2, sequence_parallel=sequence_parallel))[0]
    assert one.tensor_parallel == 0 < two.tensor_parallel
    assert two.products < one.products
    assert two.attention < one.attention


def test_sequence_parallel_ranks_share_the_norms():
    whole, shared = (passes(run_of(tp=2, sequence_parallel=on))[0].memory for on in (False, True))
    assert shared < whole


def test_stages_wait_for_messages_and_less_if_they_overlap():
    chunks = {"pp": 2, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
    assert passes(run_of())[0].pipeline_parallel == 0
    # Both send twice as often as without chunks; overlapped, only the start of a message is waited for.
    plain, overlapped = passes(run_of(pp=2), world_size=16)[0], passes(run_of(**chunks), world_size=16)[0]
    assert 0 < overlapped.pipeline_parallel < 2 * plain.pipeline_parallel


def test_times_add_up():
    forward, backward = passes(run_of(tp=2, pp=2))
    assert (forward + backward).total == pytest.approx(forward.total + backward.total)
    assert forward.times(3).total == pytest.approx(3 * forward.total)
    assert Times().total == 0


def test_an_adapter_takes_time(toy_parts):
    from megatron_vlm.config.adapters.beside_mlp import Config

    plain = run_of(freeze=PART_NAMES[:2])
    adapted = dataclasses.replace(plain, model=dataclasses.replace(plain.model, adapter=Config(rank=4)))
    assert all(b.products > a.products for a, b in zip(passes(plain), passes(adapted), strict=True))
