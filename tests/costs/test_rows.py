import dataclasses

import pytest

from megatron_vlm.costs.rows import TEXT_OF_PAIR, pairs, text
from tests.support.configs import tiny_run

PAIR = 16 + TEXT_OF_PAIR


def run_of(seq_length, micro_batch_size=1):
    run = tiny_run(training={"micro_batch_size": micro_batch_size})
    return dataclasses.replace(run, data=dataclasses.replace(run.data, seq_length=seq_length))


def test_a_row_holds_as_many_pairs_as_fit_and_text_up_to_its_end():
    row = pairs(run_of(3 * PAIR + 5))
    assert (row.num_images, row.num_tokens) == (3, 3 * PAIR + 5)
    # The last token of a sample has no next one.
    assert row.num_labels == 3 * (TEXT_OF_PAIR - 1) + 4
    assert row.attention_pairs == 3 * PAIR * (PAIR + 1) / 2 + 5 * 6 / 2


def test_a_row_holds_no_more_pairs_than_allowed():
    run = run_of(3 * PAIR + 5)
    row = pairs(dataclasses.replace(run, data=dataclasses.replace(run.data, max_images_per_row=2)))
    assert (row.num_images, row.num_tokens) == (2, 3 * PAIR + 5)
    assert row.num_labels == 2 * (TEXT_OF_PAIR - 1) + PAIR + 4


def test_a_row_without_a_rest_ends_with_a_pair():
    row = pairs(run_of(3 * PAIR))
    assert (row.num_images, row.num_labels) == (3, 3 * (TEXT_OF_PAIR - 1))


def test_a_row_of_text_has_a_loss_everywhere():
    row = text(run_of(100))
    assert (row.num_images, row.num_labels, row.attention_pairs) == (0, 100, 5050)


@pytest.mark.parametrize("rows", [pairs, text])
def test_a_micro_batch_of_two_rows_holds_twice_as_much(rows):
    assert rows(run_of(100, micro_batch_size=2)) == rows(run_of(100)).times(2)
