"""Rows of the vocabulary that no token of the tokenizer has keep their bits through training."""

import pytest

from tests.support.configs import VOCAB_SIZE, tiny_model, tiny_run

pytestmark = pytest.mark.distributed

LANGUAGE = tiny_model().language
NAMES = {"language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"}


def changed_rows(workers, world_size, *, weight_decay, model=None, **parallel):
    """Return the ids whose rows change over all ranks, by weight."""
    config = tiny_run(
        model=model,
        parallel=parallel,
        optimizer={"weight_decay": weight_decay},
        training={"global_batch_size": 2},
    )
    changed: dict[str, set[int]] = {}
    for answer in workers.run("tests.support.vocabulary_jobs:rows_that_change", world_size, config=config):
        for name, ids in answer.items():
            changed.setdefault(name, set()).update(ids)
    return changed


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (4, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["one", "tp2", "pp2_dp2"],
)
def test_only_rows_of_the_tokenizer_learn(workers, world_size, parallel):
    changed = changed_rows(workers, world_size, weight_decay=0.0, **parallel)
    assert set(changed) == NAMES
    for ids in changed.values():
        assert ids
        assert max(ids) < VOCAB_SIZE


def test_nothing_of_the_image_placeholder_or_padding_reaches_a_tied_output_layer(workers):
    model = tiny_model(share_embeddings_and_output_weights=True)
    (ids,) = changed_rows(workers, 1, weight_decay=0.0, model=model).values()
    assert max(ids) < VOCAB_SIZE


def test_weight_decay_does_not_move_the_rows_that_round_up(workers):
    for ids in changed_rows(workers, 1, weight_decay=0.5).values():
        assert set(range(VOCAB_SIZE)) <= ids  # without decay, some would keep their bits
        assert max(ids) == LANGUAGE.pad_token_id < LANGUAGE.padded_vocab_size - 1
