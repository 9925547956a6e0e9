import pytest
import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.embedding import Embedding
from tests.support.configs import tiny_model, tiny_run

pytestmark = pytest.mark.usefixtures("one_rank")

# An id twice, and the last one of the vocabulary.
IDS = torch.tensor([[3, 7, 3, 119]])


def embedding_of(precision="fp32", **language):
    model = tiny_model(**language)
    return build_model(model, tiny_run().parallel, Computation(precision=precision))[0].language_model.embedding


def reference(weight, grad):
    return torch.zeros(weight.shape).index_add_(0, IDS.flatten(), grad.flatten(0, 1).float())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradients_of_the_rows_are_added_to_the_buffer(precision):
    words = embedding_of(precision).word_embeddings
    assert type(words) is Embedding
    before = torch.randn(words.weight.shape)
    words.weight.main_grad = before.clone()
    expected = before.clone()
    for _ in range(2):  # two micro-batches
        out = words(IDS)
        assert torch.equal(out, words.weight[IDS])
        grad = torch.randn_like(out)
        out.backward(grad)
        expected += reference(words.weight, grad)
    torch.testing.assert_close(words.weight.main_grad, expected)
    assert words.weight.grad_added_to_main_grad
    assert words.weight.grad is not None


def test_without_a_buffer_the_gradient_is_that_of_torch():
    words = embedding_of().word_embeddings
    out = words(IDS)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(words.weight.grad, reference(words.weight, grad))


def test_a_frozen_embedding_has_no_gradient():
    words = embedding_of().word_embeddings.requires_grad_(False)
    assert not words(IDS).requires_grad


def test_a_weight_that_the_output_layer_shares_is_left_to_autograd():
    assert type(embedding_of(share_embeddings_and_output_weights=True).word_embeddings) is VocabParallelEmbedding
