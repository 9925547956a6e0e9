import pytest

from megatron_vlm.training.rehearsal.comparison import compare_ranks
from megatron_vlm.training.rehearsal.facts import BUILD, STEP
from tests.support.configs import tiny_model, tiny_run
from tests.training.rehearsal import programs

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 20_000}


def like_sft():
    """Four ranks as sft.yaml has 128: one row each, in tensor-parallel groups that share its images, several buckets."""
    return tiny_run(
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True, **OVERLAP},
        training={"global_batch_size": 2, "freeze": ("vision_model",), "precision": "bf16"},
    )


def pipeline(num_micro_batches=12, vpp=None, **training):
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": vpp}
    return tiny_run(
        parallel={**parallel, "overlap_p2p_comm": vpp is not None},
        training={"global_batch_size": num_micro_batches, **training},
    )


def waits(facts):
    """Return the waits of a rank by place, those of attention summed up over its lines."""
    return {wait.where: count for wait, count in facts.waits.items()}


def test_ranks_with_and_without_images_call_the_same_collectives(fake_process):
    played = fake_process.run(programs.play, like_sft(), 4, (0, 1, 2, 3))
    compared, differences = compare_ranks(played)
    assert [facts.image_counts for facts in played] == [(4,), (4,), (0,), (0,)]
    assert {("data parallel with cp", (0, 2)), ("tensor model parallel", (0, 1))} <= {
        (one.group.name, one.ranks) for one in compared
    }
    assert not differences


def test_model_that_skips_its_tower_without_images_is_found_out(fake_process):
    _, (found, *_) = compare_ranks(fake_process.run(programs.play_without_blank_images, like_sft(), 4, (0, 1, 2)))
    assert (found.group.name, found.ranks) == ("data parallel with cp", (0, 2))
    first, second = found.calls
    assert (first.op, second.op) == ("allgather", "allgather")
    assert first.sizes != second.sizes
    assert "megatron_vlm/models/vlm.py:" in first.where


@pytest.mark.parametrize("vpp", [None, 2])
def test_waits_of_a_step_follow_from_a_part_of_its_micro_batches(fake_process, vpp):
    config = pipeline(vpp=vpp)
    part, whole = (fake_process.run(programs.play, config, 2, (0, 1), num_micro_batches=n) for n in (6, 12))
    for some, every in zip(part, whole, strict=True):
        assert len(every.image_counts) == 12 * (vpp or 1)
        assert waits(some) == waits(every)
        # float32 attention reads the lengths of the samples: in each of two layers, for each micro-batch.
        (attention,) = [n for where, n in waits(every).items() if "layers/attention.py" in where]
        assert attention == 2 * 12


def test_few_micro_batches_hold_as_much_as_all(fake_process):
    few, many = (fake_process.run(programs.play, pipeline(), 2, (0,), num_micro_batches=n)[0] for n in (5, 12))
    assert few.peaks == many.peaks


def test_stage_before_another_keeps_one_micro_batch_more(fake_process):
    one, two = (fake_process.run(programs.play, pipeline(), 2, (0,), num_micro_batches=n)[0] for n in (1, 2))
    layers = 2 * 192 * (6 * 64 + 5 * 128) * 4  # at least: two layers, float32
    assert two.peaks[STEP] - one.peaks[STEP] > layers
    assert two.peaks[BUILD] == one.peaks[BUILD]


def test_recomputed_layers_keep_less(fake_process):
    kept, recomputed = (
        fake_process.run(programs.play, pipeline(recompute=name, precision="bf16"), 2, (0,))[0]
        for name in ("none", "full")
    )
    assert recomputed.activations < kept.activations


def test_first_step_makes_the_state_of_the_optimizer(fake_process):
    (facts,) = fake_process.run(programs.play, tiny_run(training={"precision": "bf16"}), 1, (0,), iterations=1)
    # bfloat16 weights, gradients, main weights and two moments in float32; small tensors are rounded up.
    assert facts.weights == pytest.approx(2 * facts.parameters, rel=0.1)
    assert facts.gradients == pytest.approx(4 * facts.learning, rel=0.1)
    assert facts.optimizer == pytest.approx(12 * facts.learning, rel=0.1)
    assert facts.parameters == facts.learning


def test_tied_embeddings_and_a_trained_tower_are_played(fake_process):
    model = tiny_model(share_embeddings_and_output_weights=True)
    config = tiny_run(parallel={"pipeline_model_parallel_size": 2}, model=model)
    first, last = fake_process.run(programs.play, config, 2, (0, 1))
    assert not compare_ranks([first, last])[1]
    assert first.learning > last.learning
