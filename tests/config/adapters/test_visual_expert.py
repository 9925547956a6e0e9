import pytest

from megatron_vlm.config import LanguageConfig
from megatron_vlm.config.adapters.visual_expert import Config
from tests.support.configs import tiny_model

LLAMA_2_7B = LanguageConfig(
    vocab_size=32000, num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32
)


def test_an_expert_nearly_doubles_llama_2_7b(monkeypatch):
    import dataclasses

    model = dataclasses.replace(tiny_model(), language=LLAMA_2_7B)
    added = Config().num_parameters(model, "language_model", num_layers=32, tensor_parallel_size=1)
    assert added == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    base = sum(LLAMA_2_7B.parameter_sizes.values())
    assert (base + added) / base == pytest.approx(1.96, abs=0.005)


def test_ranks_share_the_matrices():
    model = tiny_model()
    one, two = (
        Config().num_parameters(model, "language_model", num_layers=4, tensor_parallel_size=size) for size in (1, 2)
    )
    assert one == 2 * two == 4 * model.language.layer_weights


def test_only_gradients_are_added_and_only_for_images():
    model = tiny_model()
    added = Config().operations(model, "language_model", 100, 30)
    assert added.forward == 0
    assert added.training(learns=True, input_gradient=True) == 4 * 2 * 30 * model.language.layer_weights
    assert Config().operations(model, "language_model", 100, 0).training(learns=True, input_gradient=True) == 0
