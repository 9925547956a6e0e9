"""The decoder of transformer-engine's real modules is the decoder of torch modules, at every layout."""

import logging
from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megatron_vlm.config import TrainConfig, load_config
from megatron_vlm.models.layers.attention import PackedAttention
from megatron_vlm.parallel.groups import rank_layout
from tests.transformer_engine import stand_in
from tests.transformer_engine.jobs import parameters, sharded_tensors
from tests.transformer_engine.layouts import SIZES, build, fake_rank, layout, name, ranks_of_every_stage, wide_model

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "vila_7b").glob("[!b]*.yaml"))
LAYOUTS = [
    *(layout(*sizes) for sizes in SIZES),
    layout(2, sequence_parallel=False),
    layout(2, 4, num_layers_in_first_pipeline_stage=2),
]


def saved(chunk):
    """Return everything that decides where and as what a parameter is saved."""
    return {
        place: [
            (part.global_shape, part.local_shape, part.global_offset, part.replica_id, part.dtype) for part in parts
        ]
        for place, parts in sharded_tensors(chunk).items()
    }


def marks(chunk):
    """Return what megatron-core reads from a parameter when it reduces its gradient and sums up the norm."""
    return {
        place: (
            param_is_not_tensor_parallel_duplicate(parameter),
            getattr(parameter, "sequence_parallel", False),
            getattr(parameter, "is_replicated", False),
            getattr(parameter, "allreduce", True),
        )
        for place, parameter in parameters(chunk).items()
    }


def assert_backends_agree(parallel, model=None):
    for rank, world_size in ranks_of_every_stage(parallel):
        with fake_rank(parallel, rank, world_size):
            place = rank_layout()
            assert place.tp_rank == place.tp_size - 1
            ours, theirs = (build(parallel, backend, model=model) for backend in ("torch", "transformer_engine"))
            assert len(ours) == len(theirs) == (parallel.virtual_pipeline_model_parallel_size or 1)
            for one, other in zip(ours, theirs, strict=True):
                assert saved(one) == saved(other)
                assert marks(one) == marks(other)
                ours_by_place, theirs_by_place = parameters(one), parameters(other)
                for where, parameter in ours_by_place.items():
                    assert torch.equal(parameter, theirs_by_place[where]), where


@pytest.mark.parametrize("parallel", LAYOUTS, ids=name)
def test_keys_shapes_slices_marks_and_first_weights_are_those_of_torch_modules(parallel):
    assert_backends_agree(parallel)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_grouped_queries_too(tp):
    assert_backends_agree(layout(tp), wide_model(num_query_groups=4))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_layouts_of_the_examples_too(path):
    assert_backends_agree(load_config(TrainConfig, path).parallel)


def modules_of(chunk, *classes):
    return [module for module in chunk.modules() if isinstance(module, classes)]


def test_the_layers_are_transformer_engine_s_own():
    import transformer_engine.pytorch as te
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    with fake_rank(layout(1)):
        (chunk,) = build(layout(1), "transformer_engine")
    decoder = chunk.language_model.decoder
    assert len(modules_of(decoder, te.LayerNormLinear)) == 2 * len(decoder.layers)  # norm + qkv, norm + fc1
    assert len(modules_of(decoder, te.Linear)) == 2 * len(decoder.layers)  # proj, fc2
    assert len(modules_of(decoder, TEDotProductAttention)) == len(decoder.layers)
    assert isinstance(decoder.final_layernorm, te.RMSNorm)
    assert not modules_of(decoder, PackedAttention)


@pytest.fixture
def flash_attn(monkeypatch):
    """Say whether the package is there: `flash_attn(False)`."""
    find_spec = util.find_spec

    def there(is_there):
        monkeypatch.setattr(
            util,
            "find_spec",
            lambda name, *rest: (object() if is_there else None) if name == "flash_attn" else find_spec(name, *rest),
        )

    return there


def cores_of(parallel=None):
    parallel = parallel or layout(1)
    with fake_rank(parallel, 0, parallel.tensor_model_parallel_size):
        (chunk,) = build(parallel, "transformer_engine")
    return chunk.language_model, {
        type(layer.self_attention.core_attention) for layer in chunk.language_model.decoder.layers
    }


@pytest.mark.parametrize(
    ("capability", "is_there", "core"),
    [
        (stand_in.AMPERE, False, "PackedAttention"),
        (stand_in.AMPERE, True, "TEDotProductAttention"),
        (stand_in.HOPPER, False, "TEDotProductAttention"),
    ],
)
def test_before_hopper_attention_without_flash_attn_is_torch_s(capability, is_there, core, flash_attn):
    stand_in.set_capability(capability)
    flash_attn(is_there)
    _, classes = cores_of()
    assert {found.__name__ for found in classes} == {core}


def test_the_core_that_takes_the_place_attends_as_in_a_model_of_torch_modules(flash_attn):
    stand_in.set_capability(stand_in.AMPERE)
    flash_attn(False)
    parallel = layout(2)
    decoder, _ = cores_of(parallel)
    core = decoder.decoder.layers[0].self_attention.core_attention
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(24, 4, 8, generator=generator) for _ in range(3))
    borders = torch.tensor([0, 5, 24], dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=19, max_seqlen_kv=19
    )
    out = core(query, key, value, None, packed_seq_params=params)
    scores = torch.einsum("snd,tnd->nst", query, key) / 8**0.5
    sample = (torch.arange(24) >= 5).int()
    visible = (sample[:, None] == sample[None, :]) & torch.ones(24, 24).tril().bool()
    expected = torch.einsum("nst,tnd->snd", scores.masked_fill(~visible, float("-inf")).softmax(-1), value)
    torch.testing.assert_close(out, expected.reshape(24, -1))


def test_one_line_says_that_torch_attends(flash_attn, caplog):
    stand_in.set_capability(stand_in.AMPERE)
    flash_attn(False)
    parallel = layout(1, 4, 2)
    with caplog.at_level(logging.INFO), fake_rank(parallel, 0, 4):
        assert len(build(parallel, "transformer_engine")) == 2
    assert [record.message for record in caplog.records if "flash-attn" in record.message] == [
        "this GPU needs the package flash-attn for transformer-engine's attention: torch's takes its place"
    ]


def test_the_model_of_the_config_may_choose_by_itself():
    with fake_rank(layout(1)):
        (chunk,) = build(layout(1), "auto", model=replace(wide_model(), backend="auto"))
    import transformer_engine.pytorch as te

    assert modules_of(chunk, te.LayerNormLinear)
