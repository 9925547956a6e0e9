"""Where a blend changes, what was planned before stays, and every dataset is read on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.config import BlendEntry, ConfigError
from megatron_vlm.data.plan.compute import plan_rows
from megatron_vlm.data.plan.plan import build_plan
from tests.support.lengths import make_dataset, make_settings

SIZES = (150, 70, 40)


def blend_of(*steps, by="from_iteration"):
    """Return the blend with these weights of datasets a, b and c from some iterations or tokens on."""
    return tuple(
        BlendEntry(path=name, weight=weight, **({by: begin} if begin else {}))
        for begin, weights in steps
        for name, weight in weights.items()
    )


def plan_of(blend, sizes=SIZES, **changes):
    paths = list(dict.fromkeys(entry.path for entry in blend))
    datasets = [make_dataset(sizes["abc".index(path)], seed="abc".index(path)) for path in paths]
    defaults = {"train_iters": 30, "train_epochs": None, "blend": blend, "global_batch_size": 4}
    return plan_rows(make_settings(**{**defaults, **changes}), datasets)


def batches_of(rows, batch=4):
    """Return the rows of each global batch."""
    split = np.split(rows.sample_ids.astype(np.int64), rows.row_borders[1:-1])
    return [[row.tolist() for row in split[first : first + batch]] for first in range(0, len(split), batch)]


MODES = {
    "packed": {},
    "plain": {"packing": False},
    "clustered": {"packing": False, "length_clustering": True},
    "images": {"max_images_per_row": 6},
    "split": {"overflow": "split", "seq_length": 56},
    "multiples": {"sample_multiple": 8},
}
FIRST = (0, {"a": 1.0, "b": 2.0})
SECOND = (12, {"c": 1.0, "a": 1.0})
THIRD = (21, {"b": 1.0, "c": 3.0})


@pytest.mark.parametrize("mode", MODES)
def test_a_step_in_the_future_leaves_all_before_as_it_was(mode):
    plans = [plan_of(blend_of(*steps), **MODES[mode]) for steps in ([FIRST], [FIRST, SECOND], [FIRST, SECOND, THIRD])]
    one, two, three = map(batches_of, plans)
    assert two[:11] == one[:11]
    assert two[11:] != one[11:]
    assert three[:20] == two[:20]
    assert three[20:] != two[20:]
    assert [plan.summary.step_iterations for plan in plans] == [(), (11,), (11, 20)]
    assert all(plan.summary.num_iterations == plan.summary.stable_iterations == 30 for plan in plans)
    if mode == "clustered":
        assert plans[0].seq_lengths[:11].tolist() == plans[2].seq_lengths[:11].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_all_steps_fit(mode):
    rows = plan_of(blend_of(FIRST, SECOND, THIRD), **MODES[mode])
    tokens = np.add.reduceat(rows.pool.lengths[rows.sample_ids], rows.row_borders[:-1])
    assert tokens.max() <= MODES[mode].get("seq_length", 128)
    if mode == "images":
        assert np.add.reduceat(rows.pool.num_images[rows.sample_ids], rows.row_borders[:-1]).max() <= 6


def test_a_step_that_never_begins_changes_nothing():
    assert batches_of(plan_of(blend_of(FIRST, (31, {"c": 1.0})))) == batches_of(plan_of(blend_of(FIRST)))
    assert plan_of(blend_of(FIRST, (31, {"c": 1.0}))).summary.step_iterations == ()


def test_a_step_has_its_own_datasets_and_proportions():
    rows = plan_of(blend_of(FIRST, (11, {"a": 1.0, "b": 1.0, "c": 2.0})), train_iters=40)
    used = np.concatenate([sum(batch, []) for batch in batches_of(rows)[10:]])
    counts = np.histogram(used, bins=[0, 150, 220, 260])[0] / len(used)
    assert counts == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    before = np.concatenate([sum(batch, []) for batch in batches_of(rows)[:10]])
    assert before.max() < 220


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 60)] * 3),
    begins=st.lists(st.integers(2, 40), min_size=1, max_size=4, unique=True).map(sorted),
    mode=st.sampled_from(sorted(MODES)),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_no_sample_comes_again_before_all_others_of_its_dataset(sizes, begins, mode, seed, data):
    # One pass over every dataset is one pass over the blend of the first step, so that there it holds as well.
    weights = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.3, 1.0, 2.5]), min_size=1)
    first = tuple(BlendEntry(path=name) for name in "ab")
    later = blend_of(*[(begin, data.draw(weights)) for begin in begins])
    rows = plan_of((*first, *later), sizes, train_iters=40, seed=seed, **MODES[mode])
    assert rows.summary.num_iterations == 40
    seen = np.zeros(len(rows.pool.lengths), dtype=int)
    members = [ids for ids in rows.pool.usable]
    for batch in batches_of(rows):
        for sample in sum(batch, []):
            seen[sample] += 1
        for ids in members:
            # A batch may hold the end of a pass and the beginning of the next one.
            of_batch = np.bincount(np.array(sum(batch, [])), minlength=len(seen))[ids]
            assert (seen[ids] - of_batch).max() - seen[ids].min() <= 1
    for ids in members:
        assert np.ptp(seen[ids]) <= 1


@settings(max_examples=25, deadline=None)
@given(
    begins=st.lists(st.integers(2, 30), min_size=1, max_size=3, unique=True).map(sorted),
    mode=st.sampled_from(sorted(MODES)),
    batch=st.integers(1, 9),
)
def test_steps_begin_with_their_iteration(begins, mode, batch):
    steps = [(begin, {"abc"[number % 3]: 1.0}) for number, begin in enumerate(begins)]
    rows = plan_of(blend_of(FIRST, *steps), global_batch_size=batch, **MODES[mode])
    assert list(rows.summary.step_iterations) == [begin - 1 for begin in begins]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 14000), min_size=1, max_size=3, unique=True).map(sorted),
    mode=st.sampled_from(sorted(MODES)),
)
def test_steps_begin_with_the_first_batch_after_their_tokens(tokens, mode):
    steps = [(begin, {"abc"[number % 3]: 1.0}) for number, begin in enumerate(tokens)]
    rows = plan_of(blend_of(FIRST, *steps, by="from_tokens"), **MODES[mode])
    done = np.cumsum([int(rows.pool.lengths[np.array(sum(batch, []))].sum()) for batch in batches_of(rows)])
    expected = [int(np.argmax(done >= begin)) + 1 for begin in tokens if done[-2] >= begin]
    assert list(rows.summary.step_iterations) == expected


def test_a_step_whose_pass_is_nearly_empty_is_refused():
    blend = (BlendEntry(path="a"), BlendEntry(path="a", epochs=0.001, from_iteration=5))
    with pytest.raises(ConfigError, match="a pass over data.blend has 0.15 samples, fewer than 4"):
        plan_of(blend)


def test_a_plan_tells_past_from_future(tmp_path):
    def build(*steps, **changes):
        blend = blend_of(*steps)
        paths = dict.fromkeys(entry.path for entry in blend)
        datasets = [make_dataset(SIZES["abc".index(path)], seed="abc".index(path)) for path in paths]
        defaults = {"train_iters": 30, "train_epochs": None, "global_batch_size": 4}
        return build_plan(make_settings(**{**defaults, "blend": blend, **changes}), datasets, tmp_path)

    one, two = build(FIRST), build(FIRST, SECOND)
    assert one.consumed_hash(11) == two.consumed_hash(11)
    assert one.consumed_hash(12) != two.consumed_hash(12)
    assert one.hashes.settings == two.hashes.settings != build(FIRST, seed=5).hashes.settings
    assert two.datasets_until(11) == one.datasets_until(30) == one.hashes.datasets
    assert two.datasets_until(12) == two.hashes.datasets
    assert len(two.hashes.datasets) == 3
    assert one.hashes.data != two.hashes.data != build(FIRST, (12, {"a": 1.0, "c": 1.0})).hashes.data


def test_the_datasets_of_later_steps_lie_behind_the_fragments_of_earlier_ones(tmp_path):
    blend = blend_of((0, {"a": 1.0}), (5, {"b": 1.0, "c": 1.0}))
    datasets = [make_dataset(size, seed) for seed, size in enumerate(SIZES)]
    plan = build_plan(
        make_settings(blend=blend, train_iters=30, train_epochs=None, overflow="split", seq_length=40),
        datasets,
        tmp_path,
    )
    fragments = plan.sample_ranges[1][0] - 150
    assert fragments > 0
    assert plan.dataset_starts(SIZES).tolist() == [0, 150 + fragments, 220 + fragments]
    for sample_id in np.unique(np.concatenate([plan.sample_ids(iteration) for iteration in range(30)])):
        sample, first, last = plan.fragments.find(int(sample_id))
        dataset = int(np.searchsorted(plan.dataset_starts(SIZES), sample, side="right")) - 1
        assert 0 <= sample - plan.dataset_starts(SIZES)[dataset] < SIZES[dataset]
        assert (first > 0) == (sample != sample_id)
