"""The report counts what each data-parallel rank would get."""

import dataclasses
import itertools

import numpy as np
import pytest

from megatron_vlm.config import BlendEntry, UsageError
from megatron_vlm.data.plan import balance_report
from megatron_vlm.data.plan.balance_report import report_balance
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.plan import plan_rows
from megatron_vlm.data.plan.settings import PlanSettings
from megatron_vlm.data.samples import Outlines


class Lengths:
    """A dataset of lengths alone."""

    fingerprint = "lengths"

    def __init__(self, number: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.num_images = rng.integers(0, 6, number).astype(np.int32)
        self.text_lengths = rng.integers(1, 60, number).astype(np.int32)

    def __len__(self) -> int:
        return len(self.num_images)


SETTINGS = PlanSettings(
    blend=(BlendEntry(path="a"),),
    seq_length=256,
    image_tokens=ImageTokens(16),
    packing=True,
    overflow="fail",
    seed=3,
    global_batch_size=32,
    train_iters=None,
    train_epochs=1.0,
)


@pytest.fixture(scope="module")
def dataset():
    return Lengths(8000)


def count_by_hand(rows, per_sample, size):
    """Fullest rank of every full batch, and the mean rank, row by row."""
    fullest, means = [], []
    for batch in range((len(rows.row_borders) - 1) // 32):
        ranks = [0.0] * size
        for place in range(32):
            row = 32 * batch + place
            ids = rows.sample_ids[rows.row_borders[row] : rows.row_borders[row + 1]]
            ranks[place % size] += float(per_sample[ids].sum())
        fullest.append(max(ranks))
        means.append(sum(ranks) / size)
    return fullest, means


@pytest.mark.parametrize("size", [1, 4, 32])
def test_figures_equal_a_count_by_hand(dataset, size):
    rows = plan_rows(SETTINGS, [dataset])
    lengths = (dataset.num_images * 16 + dataset.text_lengths).astype(np.float64)
    found = {balance.load: balance for balance in report_balance(SETTINGS, rows, [size])}
    for load, per_sample in (("images", dataset.num_images), ("attention work", lengths**2)):
        fullest, means = count_by_hand(rows, per_sample, size)
        assert found[load].planned == pytest.approx(sum(fullest) / sum(means))
        assert found[load].worst == pytest.approx(max(f / m for f, m in zip(fullest, means, strict=True)))


def test_planned_order_is_more_even_than_a_random_one_and_not_below_the_bound(dataset):
    for balance in report_balance(SETTINGS, plan_rows(SETTINGS, [dataset]), [2, 8, 16]):
        assert 1 - 1e-9 <= balance.lower_bound <= balance.planned + 1e-9 < balance.random
        assert balance.worst < balance.random_worst


def test_one_row_a_rank_is_the_bound_of_work(dataset):
    balance = report_balance(SETTINGS, plan_rows(SETTINGS, [dataset]), [32])[1]
    assert balance.planned == pytest.approx(balance.lower_bound)


class Blend:
    """A dataset of lengths alone, like the paper's: images at 576 tokens, documents of many and pairs of one."""

    def __init__(self, name: str, num_images: np.ndarray, words: float, rng: np.random.Generator) -> None:
        self.fingerprint, self.num_images = name, num_images.astype(np.int32)
        self.text_lengths = (2 + num_images * rng.gamma(4.0, words / 4, len(num_images))).astype(np.int32)

    def __len__(self) -> int:
        return len(self.num_images)

    def outlines(self, samples: np.ndarray) -> Outlines:
        parts = [[int(self.text_lengths[sample])] + [0] * int(self.num_images[sample]) for sample in samples]
        tokens = np.array(sum(parts, []))
        return Outlines(np.cumsum([0, *map(len, parts)]), tokens == 0, tokens > 0, tokens)


@pytest.fixture(scope="module")
def paper_balance():
    rng = np.random.default_rng(0)
    documents = Blend("mmc4", np.clip(rng.poisson(4, 10_000), 1, 6), 122.5, rng)
    pairs = Blend("coyo", np.ones(40_000), 22.7, rng)
    settings = dataclasses.replace(
        SETTINGS,
        blend=tuple(BlendEntry(path=dataset.fingerprint, images=1.0) for dataset in (documents, pairs)),
        seq_length=4096,
        image_tokens=ImageTokens(576),
        overflow="truncate",
        global_batch_size=1024,
    )
    found = report_balance(settings, plan_rows(settings, [documents, pairs]), [8, 64, 512])
    return {(balance.load, balance.data_parallel_size): balance for balance in found}


@pytest.mark.parametrize("load", ["images", "attention work"])
@pytest.mark.parametrize("size", [8, 64, 512])
def test_paper_blend_is_even_on_many_ranks(paper_balance, load, size):
    balance = paper_balance[load, size]
    assert balance.planned - balance.lower_bound <= (balance.random - balance.lower_bound) / 15
    assert balance.worst < balance.random_worst


def test_rows_in_pairs_make_work_even_on_many_ranks(paper_balance):
    # 1.023 and 1.42 when rows are dealt one by one.
    assert paper_balance["attention work", 64].planned < 1.015
    assert paper_balance["attention work", 512].planned < 1.37


@pytest.mark.parametrize(("rows", "size"), [(6, 3), (6, 2), (8, 2), (4, 4), (6, 1)])
def test_no_order_goes_below_the_bound(rows, size):
    rng = np.random.default_rng(0)
    orders = np.array(list(itertools.permutations(range(rows))))
    for load in rng.gamma(1.0, 1.0, (10, rows)):
        best = balance_report._fullest(load[orders], size).min()
        bound = balance_report._least_fullest(load[None], size)[0]
        assert bound <= best + 1e-9
        assert bound >= max(load.sum() / size, load.max()) - 1e-9
        if rows == 2 * size:
            assert bound == pytest.approx(best)


def test_clustered_rows_stay_in_their_batch(dataset):
    settings = dataclasses.replace(SETTINGS, packing=False, length_clustering=True)
    for balance in report_balance(settings, plan_rows(settings, [dataset]), [8]):
        assert balance.planned <= balance.random < 1.5


@pytest.mark.parametrize("size", [0, 3, 64])
def test_ranks_that_do_not_share_the_batch_are_refused(dataset, size):
    with pytest.raises(UsageError, match=f"{size} data-parallel ranks do not share .*=32 evenly"):
        report_balance(SETTINGS, plan_rows(SETTINGS, [dataset]), [8, size])


def test_less_than_a_batch_is_refused():
    with pytest.raises(UsageError, match=r"\d rows do not fill a global batch of 32"):
        report_balance(SETTINGS, plan_rows(SETTINGS, [Lengths(20)]), [8])
