import importlib.util
from functools import partial

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.utils.checkpoint import checkpoint

from megatron_vlm.config import ConfigError, ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.language_model import can_fuse_swiglu, language_transformer_config
from megatron_vlm.models.layers.attention import PackedAttention
from tests.support.configs import tiny_model
from tests.support.host_reads import HostReads
from tests.support.micro_batches import make_micro_batch

MODEL = tiny_model()


@pytest.fixture
def model(one_rank):
    return build_model(MODEL, ParallelConfig(), Computation())[0]


def batches(*num_labels):
    """Return micro-batches of the same length whose losses are at other positions."""
    return [
        make_micro_batch(MODEL, num_images=1, num_text=30, num_labels=count, seed=seed).arguments
        for seed, count in enumerate(num_labels)
    ]


def gradients(model, arguments):
    """Do the forward passes of all micro-batches, then the backward passes; return the gradient of every parameter."""
    model.zero_grad()
    losses = [model(**each).sum() for each in arguments]
    for loss in losses:
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num_labels", [(20, 20), (20, 7)])
def test_recomputed_decoder_reads_the_positions_of_its_own_micro_batch(model, num_labels):
    arguments = batches(*num_labels)
    arguments[1]["label_index"] = arguments[1]["label_index"] - 5  # other positions, also where there are as many
    arguments[1]["labels"] = torch.full_like(arguments[1]["labels"], 9)
    expected = gradients(model, arguments)
    # As a schedule with two micro-batches under way does: the second forward comes before the first is recomputed.
    model.language_model.forward = partial(checkpoint, model.language_model.forward, use_reentrant=False)
    recomputed = gradients(model, arguments)
    for name, gradient in expected.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_loss_of_a_position_is_that_of_its_logits(model):
    (arguments,) = batches(12)
    with torch.no_grad():
        losses = model(**arguments)
        logits = model(**{**arguments, "labels": None, "label_index": None})[0]
    chosen, labels = arguments["label_index"], arguments["labels"][0]
    expected = torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none")
    # Two implementations of the same sum in float32.
    torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-6)


def test_logits_of_chosen_positions_are_those_of_all_positions(model):
    (arguments,) = batches(12)
    index = torch.tensor([3, 30, 11])
    with torch.no_grad():
        everywhere = model(**{**arguments, "labels": None, "label_index": None})
        chosen = model(**{**arguments, "labels": None, "label_index": index})
    assert chosen.shape == (1, 3, MODEL.language.vocab_size)
    # A product of fewer rows may sum in another order: float32.
    torch.testing.assert_close(chosen, everywhere[:, index], rtol=1e-5, atol=1e-5)


def test_a_later_token_changes_nothing_before_it(model):
    (arguments,) = batches(12)
    arguments = {**arguments, "labels": None, "label_index": None}
    other = arguments["input_ids"].clone()
    other[0, -4] = 5
    with torch.no_grad():
        changed = (model(**arguments) - model(**{**arguments, "input_ids": other})).abs().amax(dim=-1)[0]
    assert changed[:-4].max() == 0
    assert changed[-4:].min() > 0


def transformer_config(**parallel):
    return language_transformer_config(MODEL.language, ParallelConfig(**parallel), Computation(), "torch")


def test_stages_wait_for_their_neighbour_and_not_for_the_whole_device():
    config = transformer_config(pipeline_model_parallel_size=2)
    assert config.batch_p2p_comm
    assert not config.batch_p2p_sync


@pytest.mark.parametrize(("has_gpu", "has_compiler"), [(True, True), (True, False), (False, True)])
def test_swiglu_is_fused_on_a_gpu_with_a_compiler_for_it(monkeypatch, has_gpu, has_compiler):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_compiler else None)
    assert can_fuse_swiglu() == (has_gpu and has_compiler)
    assert transformer_config().bias_activation_fusion == (has_gpu and has_compiler)


def packed(borders, max_seqlen):
    borders = torch.tensor(borders, dtype=torch.int32)
    return PackedSeqParams("thd", borders, borders, max_seqlen_q=max_seqlen, max_seqlen_kv=max_seqlen)


@pytest.mark.parametrize("max_seqlen", [48, 60])
def test_positions_restart_at_each_sample_whatever_the_longest_is_said_to_be(model, max_seqlen):
    ids = make_micro_batch(MODEL, num_images=0, num_text=60, num_labels=1).arguments
    lengths = [48, 12]
    with torch.no_grad():
        text = model.language_model.embedding(input_ids=ids["input_ids"], position_ids=None)
        together = model.language_model(text, packed_seq_params=packed([0, 48, 60], max_seqlen))
        alone = [model.language_model(part) for part in text.split(lengths)]
    # The same products; the kernel sums them in blocks of another size.
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_rotation_of_packed_samples_reads_nothing_on_the_host(model, monkeypatch):
    # On the CPU the attention core itself loops over the samples; a GPU has a kernel for that.
    monkeypatch.setattr(PackedAttention, "_attend_sample_by_sample", lambda self, q, k, v, params: v.repeat(1, 2, 1))
    (arguments,) = batches(12)
    arguments["packed_seq_params"] = packed([0, 20, arguments["input_ids"].numel()], 64)
    with HostReads() as reads:
        model(**arguments).sum().backward()
    assert reads.count == 0


def test_fp8_with_layers_that_would_compute_in_bf16_is_refused():
    with pytest.raises(ConfigError, match=r"training.fp8=hybrid needs the layers of transformer-engine"):
        language_transformer_config(MODEL.language, ParallelConfig(), Computation(fp8="hybrid"), "torch")
