import pytest
import torch

from megatron_vlm.config.inference import SamplingOptions
from megatron_vlm.evaluation.sampling import choose_tokens, draw_uniforms

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def frequencies(options: SamplingOptions, count: int = 4000) -> list[float]:
    """Return how often each token is chosen when the draws are spread evenly."""
    uniforms = (torch.arange(count) + 0.5) / count
    chosen = choose_tokens(LOGITS.expand(count, -1), options, uniforms)
    return [round(value, 3) for value in (torch.bincount(chosen, minlength=4) / count).tolist()]


def test_temperature_0_takes_the_most_likely_token():
    assert choose_tokens(LOGITS[None], SamplingOptions(), torch.tensor([0.99])).tolist() == [1]


def test_temperature_1_draws_from_the_distribution():
    assert frequencies(SamplingOptions(temperature=1.0)) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=2e-3)


def test_a_high_temperature_flattens():
    assert frequencies(SamplingOptions(temperature=1e6)) == pytest.approx([0.25] * 4, abs=2e-3)


def test_top_k_keeps_the_k_most_likely():
    expected = [0.0, 4 / 7, 0.0, 3 / 7]
    assert frequencies(SamplingOptions(temperature=1.0, top_k=2)) == pytest.approx(expected, abs=2e-3)


def test_top_p_keeps_the_fewest_that_reach_p():
    expected = [0.0, 4 / 9, 2 / 9, 3 / 9]
    assert frequencies(SamplingOptions(temperature=1.0, top_p=0.75)) == pytest.approx(expected, abs=2e-3)


def test_a_tiny_top_p_still_keeps_one():
    assert frequencies(SamplingOptions(temperature=1.0, top_p=1e-9)) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 0)])
def test_the_ends_of_the_draw_choose_a_token(uniform, token):
    draw = torch.tensor([uniform], dtype=torch.float64)
    assert choose_tokens(LOGITS[None], SamplingOptions(temperature=1.0), draw).tolist() == [token]
    assert choose_tokens(LOGITS[None], SamplingOptions(temperature=1.0, top_k=1), draw).tolist() == [1]


def test_draws_are_those_of_seed_and_prompt():
    first = draw_uniforms(SamplingOptions(seed=1), 0)
    assert torch.equal(first, draw_uniforms(SamplingOptions(seed=1), 0))
    assert not torch.equal(first, draw_uniforms(SamplingOptions(seed=1), 1))
    assert not torch.equal(first, draw_uniforms(SamplingOptions(seed=2), 0))
