import dataclasses

import pytest

from megatron_vlm.costs.flops import Work
from megatron_vlm.costs.memory import LIBRARIES, cache_bytes, estimate_memory
from megatron_vlm.costs.parameters import stage_sizes
from megatron_vlm.costs.rows import pairs, text
from tests.support.configs import tiny_model, tiny_run


def run_of(tp=1, pp=1, dp=1, model=None, training=None, **parallel):
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **parallel}
    return tiny_run(parallel=layout, model=model, training={"global_batch_size": 4 * dp, **(training or {})})


def test_distributed_optimizer_shares_its_state_among_data_parallel_ranks():
    memory = [estimate_memory(run_of(dp=dp), 0, dp) for dp in (1, 4)]
    assert memory[0].optimizer == 4 * memory[1].optimizer
    assert memory[0].gradients == memory[1].gradients


def test_plain_optimizer_keeps_its_whole_state():
    memory = [estimate_memory(run_of(dp=dp, use_distributed_optimizer=False), 0, dp) for dp in (1, 4)]
    assert memory[0].optimizer == memory[1].optimizer


def test_context_parallel_ranks_share_activations_and_the_state_of_the_optimizer():
    # Rows that hold images and labels on both ranks alike.
    one, two = (estimate_memory(run_of(dp=2, context_parallel_size=size), 0, 2) for size in (1, 2))
    assert 1.8 < one.activations / two.activations <= 2
    assert (one.weights, one.gradients, one.optimizer) == (two.weights, two.gradients, 2 * two.optimizer)


def test_weights_in_bf16_take_half_and_their_optimizer_half_as_much_again():
    full, half = (estimate_memory(run_of(training={"precision": name}), 0, 1) for name in ("fp32", "bf16"))
    assert full.weights == 2 * half.weights
    assert 3 * full.optimizer == 2 * half.optimizer


def test_frozen_decoder_has_neither_gradients_nor_optimizer():
    frozen = estimate_memory(run_of(training={"freeze": ("vision_model", "language_model")}), 0, 1)
    assert frozen.gradients == 4 * stage_sizes(run_of())[0].vision_projection


def test_a_stage_keeps_the_activations_of_one_micro_batch_more_than_the_next():
    config = run_of(pp=4)
    first, second, third, _ = (estimate_memory(config, stage, 1).activations for stage in range(4))
    assert first > second > third
    # Both are in the middle: they hold 3 and 2 times the same, and as much for a moment.
    per_micro_batch = second - third
    assert 2 * per_micro_batch < third < 3 * per_micro_batch


def test_the_fuller_of_two_kinds_of_rows_counts():
    config = run_of()
    both = [estimate_memory(config, 0, 1, work=rows(config)).activations for rows in (pairs, text)]
    assert estimate_memory(config, 0, 1).activations == max(both)


def test_more_images_and_more_labels_take_more():
    def activations(num_images, num_labels):
        work = Work(num_tokens=192, attention_pairs=0, num_labels=num_labels, num_images=num_images)
        return estimate_memory(run_of(), 0, 1, work=work).activations

    assert activations(1, 10) < activations(4, 10)
    assert activations(1, 10) < activations(1, 192)


def test_a_trained_tower_keeps_activations_and_a_frozen_one_none():
    frozen, trained = (estimate_memory(run_of(training={"freeze": freeze}), 0, 1) for freeze in (("vision_model",), ()))
    assert trained.activations > frozen.activations
    assert trained.gradients > frozen.gradients


@pytest.mark.parametrize(("sharded", "copies"), [(True, 2), (False, 1)])
def test_weights_stand_twice_while_the_buffers_of_the_distributed_optimizer_are_made(sharded, copies):
    memory = estimate_memory(run_of(use_distributed_optimizer=sharded), 0, 1)
    assert memory.start == copies * memory.weights + memory.gradients


def test_buffers_are_made_one_chunk_after_the_other():
    layout = {"pipeline_model_parallel_layout": "E|t|t*2|tL", "overlap_p2p_comm": True}
    config = run_of(pp=2, **layout)
    memory, first = estimate_memory(config, 0, 1), stage_sizes(config)[0].learning_by_chunk[0]
    # Weights of the second chunk stand twice when all gradients are there.
    assert memory.start == 2 * memory.weights - 4 * first + memory.gradients


def test_the_start_is_the_peak_where_a_step_keeps_little():
    memory = estimate_memory(run_of(dp=64, training={"recompute": "full", "precision": "bf16"}), 0, 64)
    little = dataclasses.replace(memory, activations=0)
    assert little.peak == memory.start > memory.weights + memory.gradients + memory.optimizer


def test_recomputation_and_sequence_parallelism_keep_less():
    plain = estimate_memory(run_of(tp=2), 0, 1).activations
    split = estimate_memory(run_of(tp=2, sequence_parallel=True), 0, 1).activations
    recomputed = estimate_memory(run_of(tp=2, training={"recompute": "full"}), 0, 1).activations
    assert recomputed < split < plain


def test_the_peak_of_a_step_is_the_sum_of_its_kinds_and_libraries_come_on_top():
    memory = estimate_memory(run_of(), 0, 1)
    assert memory.peak == memory.weights + memory.gradients + memory.optimizer + memory.activations
    assert memory.total == memory.peak + LIBRARIES


def test_the_cache_of_a_position_holds_keys_and_values_of_every_layer():
    # 4 layers, 2 groups of 16 channels
    assert cache_bytes(tiny_model().language, itemsize=2) == 2 * 2 * 4 * 32
