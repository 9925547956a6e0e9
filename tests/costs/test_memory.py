from megatron_vlm.costs.memory import cache_bytes, estimate_memory
from megatron_vlm.costs.parameters import stage_sizes
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


def test_weights_in_bf16_take_half_and_their_optimizer_half_as_much_again():
    full, half = (estimate_memory(run_of(training={"precision": name}), 0, 1) for name in ("fp32", "bf16"))
    assert full.weights == 2 * half.weights
    assert 3 * full.optimizer == 2 * half.optimizer


def test_frozen_decoder_has_neither_gradients_nor_optimizer():
    frozen = estimate_memory(run_of(training={"freeze": ("vision_model", "language_model")}), 0, 1)
    assert frozen.gradients == 4 * stage_sizes(run_of())[0].vision_projection


def test_first_stage_keeps_the_activations_of_the_most_micro_batches():
    first, last = (estimate_memory(run_of(pp=4), stage, 1).activations for stage in (0, 3))
    assert first == 4 * last


def test_recomputation_and_sequence_parallelism_keep_less():
    plain = estimate_memory(run_of(tp=2), 0, 1).activations
    split = estimate_memory(run_of(tp=2, sequence_parallel=True), 0, 1).activations
    recomputed = estimate_memory(run_of(tp=2, training={"recompute": "full"}), 0, 1).activations
    assert recomputed < split < plain


def test_total_is_the_sum_of_its_kinds():
    memory = estimate_memory(run_of(), 0, 1)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_the_cache_of_a_position_holds_keys_and_values_of_every_layer():
    # 4 layers, 2 groups of 16 channels
    assert cache_bytes(tiny_model().language, itemsize=2) == 2 * 2 * 4 * 32
