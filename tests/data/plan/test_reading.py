"""A dataset is read on where a part of a plan has left it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data.plan.blend import order_of_epoch, read_in_epochs
from megatron_vlm.data.plan.reading import SourceReader

SEED = (3, 0, 1)


def read(reader, number):
    """Return the next samples, over the ends of passes."""
    parts = [np.empty(0, dtype=np.int64)]
    while number:
        parts.append(reader.take(min(number, reader.left())))
        number -= len(parts[-1])
    return np.concatenate(parts)


def test_a_new_reader_reads_as_a_plan_does():
    ids = np.arange(100, 107)
    assert read(SourceReader(ids, SEED), 20).tolist() == ids[read_in_epochs(7, 0, 20, SEED)].tolist()


@settings(max_examples=60)
@given(
    size=st.integers(1, 12),
    start=st.integers(0, 30),
    length=st.integers(0, 30),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_what_a_cut_pass_has_left_over_comes_first(size, start, length, share, seed):
    ids, stop = np.arange(50, 50 + size), start + length
    window = ids[read_in_epochs(size, start, stop, SEED)]
    rng = np.random.default_rng(seed)
    consumed = np.bincount(window[rng.random(length) < share], minlength=100)
    reader = SourceReader.after(ids, SEED, (start, stop), consumed)
    left = length - consumed.sum()
    rest = -stop % size
    found = read(reader, int(left))
    everything = np.bincount(window, minlength=100)
    if left and not rest:
        assert (np.bincount(found, minlength=100) + consumed == everything).all()
    after = read(reader, rest) if rest else found[:0]
    ahead = np.bincount(ids[read_in_epochs(size, stop, stop + rest, SEED)], minlength=100)
    assert (np.bincount(np.append(found, after), minlength=100) + consumed == everything + ahead).all()
    epoch = -(-stop // size)
    assert read(reader, size).tolist() == ids[order_of_epoch(size, epoch, SEED)].tolist()


def test_samples_given_back_are_read_next():
    reader = SourceReader(np.arange(9), SEED)
    assert reader.left() == 9
    first = reader.take(5)
    reader.give_back(first[[1, 4]])
    assert reader.left() == 6
    whole = reader.take(6)
    assert whole[:2].tolist() == first[[1, 4]].tolist()
    reader.give_back(whole)  # the end of the pass had been reached
    assert reader.left() == 6
    assert reader.take(6).tolist() == whole.tolist()
    reader.give_back(whole[:0])
    assert reader.left() == 9
