import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import ConfigError, Layout, derive_layout, position_multiple
from tests.support.configs import tiny_model, tiny_run


def run_of(tp=1, pp=1, global_batch_size=4, micro_batch_size=1, model=None, **parallel):
    return tiny_run(
        parallel={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **parallel},
        training={"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size},
        model=model,
    )


def test_layout_of_eight_ranks_in_two_by_two():
    layout = derive_layout(run_of(tp=2, pp=2, global_batch_size=8, micro_batch_size=2), 8)
    assert layout == Layout(world_size=8, data_parallel_size=2, num_micro_batches=2, tokens_per_micro_batch=2 * 192)


@given(tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2, 4]), dp=st.integers(1, 5), rows=st.integers(1, 4))
def test_ranks_and_rows_are_all_accounted_for(tp, pp, dp, rows):
    config = run_of(tp=tp, pp=pp, global_batch_size=dp * rows * 3, micro_batch_size=rows)
    layout = derive_layout(config, tp * pp * dp)
    assert layout.data_parallel_size * tp * pp == layout.world_size
    assert layout.num_micro_batches * layout.data_parallel_size * rows == config.training.global_batch_size


def test_world_that_the_layout_does_not_divide_names_the_next_one_that_fits():
    with pytest.raises(ConfigError, match=r"6 ranks are not a multiple of .*= 2 \* 2; fix: start 8 ranks"):
        derive_layout(run_of(tp=2, pp=2), 6)


def test_batch_that_the_ranks_do_not_divide_names_the_nearest_that_fits():
    with pytest.raises(ConfigError, match=r"global_batch_size=10 is not a multiple of .*= 2 \* 3; fix: choose 12"):
        derive_layout(run_of(global_batch_size=10, micro_batch_size=2), 3)


@given(world_size=st.integers(1, 64), batch=st.integers(1, 500), rows=st.integers(1, 8))
def test_batch_size_that_the_fix_names_is_accepted(world_size, batch, rows):
    config = run_of(global_batch_size=batch, micro_batch_size=rows)
    try:
        derive_layout(config, world_size)
    except ConfigError as error:
        named = int(re.search(r"choose (\d+)", str(error)).group(1))
        assert abs(named - batch) <= max(rows * world_size / 2, rows * world_size - batch)
        derive_layout(run_of(global_batch_size=named, micro_batch_size=rows), world_size)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_attention_heads": 6, "num_query_groups": 6, "hidden_size": 60}, r"num_attention_heads \(6\) is not a"),
        ({"ffn_hidden_size": 130}, r"ffn_hidden_size \(130\) is not a multiple of tensor parallel size \(4\)"),
        ({"num_attention_heads": 12, "num_query_groups": 6, "hidden_size": 72}, "num_query_groups=6 and tensor"),
    ],
)
def test_width_that_tensor_parallelism_does_not_divide_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        derive_layout(run_of(tp=4, model=tiny_model(**model)), 4)


def split_tower(tp, **vision):
    model = tiny_model()
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, **vision))
    return run_of(tp=tp, model=model, vision_tensor_parallel=True)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({}, r"split model\.vision\.num_attention_heads=3 over tensor_model_parallel_size=2 ranks; fix: turn it off"),
        ({"num_attention_heads": 4, "ffn_hidden_size": 71}, r"cannot split model\.vision\.ffn_hidden_size=71 over"),
    ],
)
def test_tower_that_its_ranks_cannot_split_evenly_is_refused(vision, message):
    with pytest.raises(ConfigError, match=message):
        derive_layout(split_tower(2, **vision), 2)


def test_tower_that_is_not_split_may_have_any_number_of_heads():
    assert derive_layout(run_of(tp=2), 2).data_parallel_size == 1
    assert derive_layout(split_tower(1), 1).data_parallel_size == 1
    assert derive_layout(split_tower(4, num_attention_heads=4), 4).data_parallel_size == 1


def test_fewer_query_groups_than_tensor_parallel_ranks_are_accepted():
    assert derive_layout(run_of(tp=4), 4).data_parallel_size == 1


def test_layers_that_the_pipeline_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"num_layers \(4\) is not a multiple of number of pipeline chunks \(3\)"):
        derive_layout(run_of(pp=3), 3)


def test_layers_that_the_virtual_pipeline_does_not_divide_are_refused():
    config = run_of(pp=4, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"num_layers \(4\) is not a multiple of number of pipeline chunks \(8\)"):
        derive_layout(config, 4)


def test_micro_batches_that_the_virtual_pipeline_does_not_divide_are_refused():
    parallel = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
    with pytest.raises(ConfigError, match=r"number of micro-batches \(3\) is not a multiple of pipeline size \(2\)"):
        derive_layout(run_of(pp=2, global_batch_size=3, **parallel), 2)


@pytest.mark.parametrize(("pp", "first"), [(1, 2), (2, 4), (2, 0)])
def test_first_stage_that_leaves_nothing_is_refused(pp, first):
    with pytest.raises(ConfigError, match=f"first_pipeline_stage={first} does not fit 4 layers over {pp} stages"):
        derive_layout(run_of(pp=pp, num_layers_in_first_pipeline_stage=first), pp)


def test_layers_after_the_first_stage_must_divide():
    with pytest.raises(ConfigError, match=r"the layers after the first stage \(3\) is not a multiple of .* \(2\)"):
        derive_layout(run_of(pp=3, num_layers_in_first_pipeline_stage=1), 3)


def test_uneven_first_stage_that_fits_is_accepted():
    assert derive_layout(run_of(pp=4, num_layers_in_first_pipeline_stage=1), 4).num_micro_batches == 4


def test_a_layout_of_another_number_of_layers_is_refused():
    with pytest.raises(
        ConfigError, match=r"layout has 5 decoder layers, model.language.num_layers=4; fix: let it have 4"
    ):
        derive_layout(run_of(pp=2, pipeline_model_parallel_layout="Et*4|tL"), 2)


def test_a_layout_that_no_even_split_has_is_accepted():
    assert derive_layout(run_of(pp=3, pipeline_model_parallel_layout="E|t*3|tL"), 3).num_micro_batches == 4


def test_micro_batches_that_a_layout_with_several_chunks_does_not_divide_are_refused():
    parallel = {"pipeline_model_parallel_layout": "Et|t|t|tL", "overlap_p2p_comm": True}
    with pytest.raises(ConfigError, match=r"number of micro-batches \(3\) is not a multiple of pipeline size \(2\)"):
        derive_layout(run_of(pp=2, global_batch_size=3, **parallel), 2)


def test_row_that_sequence_parallelism_does_not_divide_is_refused():
    model = tiny_model(num_attention_heads=5, num_query_groups=5, hidden_size=70, ffn_hidden_size=140, vocab_size=318)
    config = run_of(tp=5, sequence_parallel=True, model=model, global_batch_size=1)
    with pytest.raises(ConfigError, match=r"micro_batch_size \* seq_length \(192\) is not a multiple of .* \(5\)"):
        derive_layout(config, 5)


@pytest.mark.parametrize(
    ("parallel", "data", "message"),
    [
        ({}, {"seq_length": 200}, r"micro_batch_size \* seq_length \(200\) is not a multiple of .* for FP8 \(16\)"),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            {"seq_length": 208},
            r"seq_length \(208\) is not a multiple of .* for FP8 \(64\)",
        ),
        (
            {},
            {"packing": False, "length_clustering": True, "length_multiple": 8},
            r"length_multiple \(8\) is not a multiple of .* for FP8 \(16\)",
        ),
    ],
)
def test_positions_that_fp8_cannot_divide_are_refused(parallel, data, message):
    config = tiny_run(parallel=parallel, training={"fp8": "hybrid"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    with pytest.raises(ConfigError, match=message):
        derive_layout(config, 4)


def test_positions_of_any_number_are_accepted_without_fp8():
    config = tiny_run()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=201))
    assert derive_layout(config, 1).tokens_per_micro_batch == 201


def test_rows_of_every_length_divide_over_tensor_parallel_ranks():
    config = tiny_run(parallel={"tensor_model_parallel_size": 4, "sequence_parallel": True})
    data = dataclasses.replace(config.data, packing=False, length_clustering=True, length_multiple=6)
    with pytest.raises(ConfigError, match=r"length_multiple \(6\) is not a multiple of tensor parallel size \(4\)"):
        derive_layout(dataclasses.replace(config, data=data), 4)


def test_mxfp8_needs_twice_as_many_positions():
    config = tiny_run(training={"fp8": "hybrid", "fp8_recipe": "mxfp8"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=208))
    with pytest.raises(ConfigError, match=r"seq_length \(208\) is not a multiple of 32 tokens a rank for FP8"):
        derive_layout(config, 1)
    tensorwise = dataclasses.replace(config.training, fp8_recipe="tensorwise")
    assert derive_layout(dataclasses.replace(config, training=tensorwise), 1).tokens_per_micro_batch == 208


@pytest.mark.parametrize("end", ["start", "end"])
def test_layers_in_bf16_fit_into_a_stage(end):
    parallel = {"pipeline_model_parallel_size": 2}
    for count in (2, 3):
        config = tiny_run(parallel=parallel, training={"fp8": "hybrid", f"num_layers_at_{end}_in_bf16": count})
        if count == 2:
            assert derive_layout(config, 2).world_size == 2
            continue
        with pytest.raises(ConfigError, match=f"num_layers_at_{end}_in_bf16=3 is more than the 2 layers of a stage"):
            derive_layout(config, 2)


def test_positions_of_a_micro_batch_divide_among_the_ranks_in_multiples_of_fp8_and_of_samples():
    def multiple(sample_multiple=1, fp8=None, **parallel):
        config = run_of(**parallel)
        training = dataclasses.replace(config.training, fp8=fp8, precision="bf16" if fp8 else "fp32")
        data = dataclasses.replace(config.data, sample_multiple=sample_multiple)
        return position_multiple(dataclasses.replace(config, training=training, data=data))

    assert multiple() == multiple(tp=2) == 1
    assert multiple(tp=2, sequence_parallel=True) == 2
    assert multiple(tp=2, sequence_parallel=True, fp8="hybrid") == 32
    assert multiple(sample_multiple=24, fp8="hybrid") == 48


def test_rows_of_a_pipeline_keep_all_positions():
    assert position_multiple(run_of(pp=2)) is None
