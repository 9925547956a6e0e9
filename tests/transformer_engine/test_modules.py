"""What the settings make of transformer-engine's modules, and what they and the optimizer promise."""

import inspect
from dataclasses import replace

import pytest
import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.packed_seq_params import PackedSeqParams
from transformer_engine.pytorch.optimizers import FusedAdam

from megatron_vlm.models.computation import Computation
from megatron_vlm.models.language_model import language_transformer_config
from megatron_vlm.parallel.groups import stop_distributed
from tests.support.configs import tiny_model, tiny_run
from tests.support.jobs import start
from tests.transformer_engine.layouts import build, fake_rank, layout, wide_model


@pytest.fixture(autouse=True)
def one_rank():
    with fake_rank(layout(1)):
        yield


def test_deterministic_mode_needs_the_variable_that_the_launcher_sets(monkeypatch):
    computation = Computation(precision="bf16", deterministic=True)
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        build(layout(1), "transformer_engine", computation)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    (chunk,) = build(layout(1), "transformer_engine", computation)
    assert chunk.language_model.config.deterministic_mode


def test_attention_takes_every_field_of_packed_samples_that_megatron_core_hands_on():
    (chunk,) = build(layout(1), "transformer_engine")
    core = chunk.language_model.decoder.layers[0].self_attention.core_attention
    accepted = inspect.signature(te.DotProductAttention.forward).parameters
    # Those two are taken out before the call.
    handed_on = core.kept_packed_seq_params - {"cp_group", "local_cp_size"}
    assert {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"} <= handed_on
    assert handed_on <= accepted.keys()


def test_packed_causal_samples_reach_attention_as_padding_causal(monkeypatch):
    (chunk,) = build(layout(1), "transformer_engine")
    core = chunk.language_model.decoder.layers[0].self_attention.core_attention
    signature, calls = inspect.signature(te.DotProductAttention.forward), []

    def record(self, *args, **kwargs):
        calls.append(signature.bind(self, *args, **kwargs).arguments)
        return torch.zeros(16, 64)

    monkeypatch.setattr(te.DotProductAttention, "forward", record)
    borders = torch.tensor([0, 7, 16], dtype=torch.int32)
    params = PackedSeqParams("thd", borders, borders, max_seqlen_q=9, max_seqlen_kv=9)
    core(*(torch.zeros(16, 8, 8) for _ in range(3)), None, chunk_mask_type(chunk), packed_seq_params=params)
    (call,) = calls
    assert call["attn_mask_type"] == "padding_causal"
    assert call["qkv_format"] == "thd"
    assert call["cu_seqlens_q"] is borders
    assert call.get("cu_seqlens_q_padded") is None  # else the host compares borders with and without padding
    assert call["max_seqlen_q"] == call["max_seqlen_kv"] == 9


def chunk_mask_type(chunk):
    return chunk.language_model.decoder.layers[0].self_attention.attn_mask_type


def test_norms_are_built_from_the_config_and_marked_for_sequence_parallelism():
    parallel = layout(2)
    stop_distributed()
    with fake_rank(parallel, 0, 2):
        model = wide_model().language
        config = language_transformer_config(model, parallel, Computation(precision="bf16"), "transformer_engine")
        norm = TENorm(config=config, hidden_size=model.hidden_size, eps=config.layernorm_epsilon)
        assert isinstance(norm, te.RMSNorm)
        assert norm.weight.dtype == torch.bfloat16
        assert norm.weight.sequence_parallel
        assert norm.eps == config.layernorm_epsilon


def test_the_optimizer_of_a_machine_with_transformer_engine_is_its_own(tmp_path):
    stop_distributed()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    state = start(tiny_run(str(tmp_path / "run"), training={"precision": "bf16"}))
    adams = [inner.optimizer for inner in state.optimizer.chained_optimizers]
    assert adams
    assert all(isinstance(adam, FusedAdam) for adam in adams)
    for adam in adams:
        assert (adam.adam_w_mode, adam.capturable, adam.master_weights) == (1, False, False)
        assert {p.dtype for group in adam.param_groups for p in group["params"]} == {torch.float32}


@pytest.mark.parametrize("freeze", [(), ("language_model",)])
def test_layers_that_learn_add_weight_gradients_to_the_buffers_themselves(tmp_path, freeze):
    stop_distributed()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    model = replace(tiny_model(), backend="transformer_engine")
    state = start(tiny_run(str(tmp_path / "run"), model=model, training={"precision": "bf16", "freeze": freeze}))
    decoder = state.chunks[0].language_model.decoder
    linears = [module for module in decoder.modules() if isinstance(module, te.Linear | te.LayerNormLinear)]
    assert len(linears) == 4 * model.language.num_layers
    assert {module.fuse_wgrad_accumulation for module in linears} == {not freeze}
