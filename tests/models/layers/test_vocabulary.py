import pytest
import torch

from megatron_vlm.models.layers.vocabulary import clear_rows, exclude_ids


@pytest.mark.parametrize(("tp_rank", "excluded"), [(0, 0), (1, 1), (2, 4)])
def test_each_rank_excludes_the_ids_of_its_own_rows(tp_rank, excluded):
    logits = torch.zeros(2, 3, 4)
    exclude_ids(logits, 7, tp_rank)
    assert torch.equal(logits[1, 2], torch.tensor([0.0] * (4 - excluded) + [-torch.inf] * excluded))


def test_excluded_logits_get_no_gradient():
    logits = torch.randn(2, 6, requires_grad=True)
    changed = logits.clone()
    exclude_ids(changed, 4, tp_rank=0)
    changed.log_softmax(-1)[:, :4].sum().backward()
    assert logits.grad[:, :4].abs().min() > 0
    assert not logits.grad[:, 4:].any()


@pytest.mark.parametrize(("tp_rank", "kept"), [(0, 4), (1, 3), (2, 0)])
def test_each_rank_clears_its_own_rows(tp_rank, kept):
    weight = torch.nn.Parameter(torch.ones(4, 5))
    clear_rows(weight, 7, tp_rank)
    assert weight[:kept].eq(1).all()
    assert not weight[kept:].any()
