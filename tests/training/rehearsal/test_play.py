from dataclasses import replace

import pytest

from megatron_vlm.training.rehearsal.comparison import compare_ranks
from megatron_vlm.training.rehearsal.facts import BUILD, STEP
from tests.support.configs import tiny_model, tiny_run
from tests.support.parts import PROJECTOR_NAMES, tiny_projector
from tests.training.rehearsal import programs

MODEL = tiny_model(num_layers=2)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}


def like_sft():
    """Four ranks as sft.yaml has 128: one row each, tensor-parallel ranks that share its images, several buckets."""
    return tiny_run(
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True, **OVERLAP},
        training={"global_batch_size": 2, "freeze": ("vision_model",), "precision": "bf16"},
        model=MODEL,
    )


def pipeline(num_micro_batches=16, vpp=None, **training):
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": vpp}
    return tiny_run(
        parallel={**parallel, "overlap_p2p_comm": vpp is not None},
        training={"global_batch_size": num_micro_batches, **training},
        model=tiny_model(num_layers=4) if vpp else MODEL,
    )


def long_rows(context_parallel_size):
    config = tiny_run(
        parallel={"context_parallel_size": context_parallel_size},
        training={"global_batch_size": 1, "precision": "bf16"},
        model=MODEL,
    )
    return replace(config, data=replace(config.data, seq_length=4096))


def test_ranks_with_and_without_images_call_the_same_collectives(fake_process):
    played = fake_process.run(programs.play, like_sft(), 4, (0, 1, 2))
    compared, differences = compare_ranks(played)
    assert [facts.image_counts for facts in played] == [(4,), (4,), (0,)]
    assert {("data parallel with cp", (0, 2)), ("tensor model parallel", (0, 1))} <= {
        (one.group.name, one.ranks) for one in compared
    }
    assert not differences


@pytest.mark.parametrize("type", PROJECTOR_NAMES)
def test_every_projection_can_be_played(type, fake_process):
    config = replace(like_sft(), model=replace(MODEL, projection=tiny_projector(type)))
    played = fake_process.run(programs.play, config, 4, (0, 2), iterations=1)
    assert not compare_ranks(played)[1]


def test_model_that_skips_its_tower_without_images_is_found_out(fake_process):
    _, (found, *_) = compare_ranks(fake_process.run(programs.play_skipping_empty_shares, like_sft(), 4, (0, 1, 2)))
    assert (found.group.name, found.ranks) == ("data parallel with cp", (0, 2))
    first, second = found.calls
    assert (first.op, second.op) == ("allgather", "allgather")
    assert first.sizes != second.sizes
    assert "megatron_vlm/models/vlm.py:" in first.where


@pytest.mark.parametrize(("vpp", "rank"), [(None, 0), (None, 1), (2, 0)])
def test_part_of_the_micro_batches_tells_waits_and_memory_of_all(fake_process, vpp, rank):
    some, every = (
        fake_process.run(programs.play, pipeline(vpp=vpp), 2, (rank,), num_micro_batches=n, iterations=1)[0]
        for n in (8, 16)
    )
    assert len(every.image_counts) == 16 * (vpp or 1)
    assert some.waits == every.waits
    # The sums of each micro-batch stay until the end of the step, and no two rows are alike.
    assert some.peak == pytest.approx(every.peak, rel=0.01)
    # float32 attention reads the lengths of the samples in each layer, for each micro-batch.
    (attention,) = [n for wait, n in every.waits.items() if "layers/attention.py" in wait.where]
    assert attention == (vpp or 1) * 16


def test_stage_before_another_keeps_one_micro_batch_more(fake_process):
    one, two = (
        fake_process.run(programs.play, pipeline(), 2, (0,), num_micro_batches=n, iterations=1)[0] for n in (1, 2)
    )
    layer = 192 * (6 * 64 + 3 * 128) * 4  # at least, in float32
    assert two.peaks[STEP] - one.peaks[STEP] > layer
    assert two.peaks[BUILD] == one.peaks[BUILD]


def test_recomputed_layers_keep_less(fake_process):
    kept, recomputed = (
        fake_process.run(programs.play, pipeline(2, recompute=name, precision="bf16"), 2, (0,), iterations=1)[0]
        for name in ("none", "full")
    )
    assert recomputed.activations < kept.activations


def test_context_parallel_ranks_share_the_activations_of_a_row(fake_process):
    one, two = (fake_process.run(programs.play, long_rows(cp), cp, tuple(range(cp)), iterations=1) for cp in (1, 2))
    assert not compare_ranks(two)[1]
    # The bar of the project; half a row each would be 2.0, and some tensors have no position.
    assert one[0].activations >= 1.8 * max(facts.activations for facts in two)


def test_first_step_makes_the_state_of_the_optimizer(fake_process):
    (facts,) = fake_process.run(
        programs.play, tiny_run(training={"precision": "bf16"}, model=MODEL), 1, (0,), iterations=1
    )
    # bfloat16 weights, gradients, main weights and two moments in float32; small tensors are rounded up.
    assert facts.weights == pytest.approx(2 * facts.parameters, rel=0.1)
    assert facts.gradients == pytest.approx(4 * facts.learning, rel=0.1)
    assert facts.optimizer == pytest.approx(12 * facts.learning, rel=0.1)
    assert facts.parameters == facts.learning
    # The only rank writes the weights and all of the optimizer.
    assert facts.checkpoint == pytest.approx(14 * facts.parameters, rel=0.1)


@pytest.mark.parametrize("rank", [0, 2])
def test_host_waits_at_most_three_times_in_a_step(fake_process, rank):
    parallel = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, **OVERLAP}
    config = tiny_run(parallel=parallel, training={"precision": "bf16", "global_batch_size": 8}, model=MODEL)
    (facts,) = fake_process.run(programs.play, config, 4, (rank,))
    assert 0 < sum(facts.waits.values()) <= 3, facts.waits


def test_tied_embeddings_and_a_trained_tower_are_played(fake_process):
    model = tiny_model(num_layers=2, share_embeddings_and_output_weights=True)
    config = tiny_run(parallel={"pipeline_model_parallel_size": 2}, model=model)
    first, last = fake_process.run(programs.play, config, 2, (0, 1))
    assert not compare_ranks([first, last])[1]
    assert first.learning > last.learning


def test_stage_that_learns_nothing_has_no_gradients_and_no_optimizer(fake_process):
    first, last = fake_process.run(programs.play, pipeline(2, freeze=("language_model",)), 2, (0, 1))
    assert first.optimizer > 0
    assert first.gradients > 0
    assert (last.optimizer, last.gradients, last.learning) == (0, 0, 0)
    assert last.weights > 0
    assert not compare_ranks([first, last])[1]
