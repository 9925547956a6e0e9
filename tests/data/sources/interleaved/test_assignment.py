import itertools
import time

import numpy as np
import pytest

from megatron_vlm.data.rejects import RejectError
from megatron_vlm.data.sources.interleaved.assignment import assign_each_best, assign_linear, reassign


def best_sum(similarity: np.ndarray) -> float:
    """The highest sum over all ways to give each image, or each sentence if there are fewer, one of its own."""
    small = similarity if similarity.shape[0] <= similarity.shape[1] else similarity.T
    ways = itertools.permutations(range(small.shape[1]), small.shape[0])
    return max(sum(small[row, column] for row, column in enumerate(way)) for way in ways)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 3), (3, 6), (5, 5), (6, 4), (4, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_linear_assignment_is_the_best_of_all_ways(shape, ties):
    generator = np.random.default_rng(sum(shape))
    for _ in range(30):
        similarity = generator.integers(0, 4, shape) / 4 if ties else generator.normal(size=shape)
        found = assign_linear(similarity)
        if shape[0] <= shape[1]:
            assert len(set(found)) == len(found)
            assert sum(similarity[image, sentence] for image, sentence in enumerate(found)) == pytest.approx(
                best_sum(similarity)
            )
        else:
            assert set(found) == set(range(shape[1]))


def test_images_beyond_the_sentences_go_to_their_most_similar_one():
    similarity = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.7], [0.3, 0.2]])
    assert assign_linear(similarity) == [0, 0, 1, 0]
    assert assign_linear(np.array([[0.9, 0.8], [0.9, 0.1], [0.2, 0.1]])) == [1, 0, 0]
    assert assign_linear(np.array([[0.1], [0.9], [0.5]])) == [0, 0, 0]


@pytest.mark.parametrize("shape", [(6, 4), (5, 2), (4, 1)])
def test_each_sentence_has_one_image_of_the_best_assignment_and_the_rest_is_argmax(shape):
    generator = np.random.default_rng(sum(shape))
    for _ in range(30):
        similarity = generator.normal(size=shape)
        found = assign_linear(similarity)
        ways = itertools.permutations(range(shape[0]), shape[1])
        best = max(ways, key=lambda way: sum(similarity[image, column] for column, image in enumerate(way)))
        expected = similarity.argmax(axis=1)
        expected[list(best)] = range(shape[1])
        assert found == expected.tolist()


def test_each_best_may_share_a_sentence():
    assert assign_each_best(np.array([[0.1, 0.9], [0.2, 0.8]])) == [1, 1]


def test_without_sentences_no_image_has_one():
    assert assign_each_best(np.zeros((2, 0))) == assign_linear(np.zeros((2, 0))) == [None, None]
    assert assign_linear(np.zeros((0, 3))) == []


def test_the_largest_document_takes_less_than_a_second_of_processor_time():
    similarity = np.random.default_rng(0).random((100, 1000))
    assign_linear(similarity[:1])  # imports scipy
    start = time.process_time()
    assign_linear(similarity)
    assert time.process_time() - start < 1.0


def record(matrix, names="abc") -> dict:
    infos = [{"image_name": name, "matched_text_index": 0, "matched_sim": 0.0} for name in names]
    return {"image_info": infos, "similarity_matrix": matrix}


def test_images_get_their_new_sentence_and_its_similarity_and_keep_their_order():
    given = record([[0.9, 0.8], [0.9, 0.1]], "ab")
    found = reassign(given, 2, "linear")
    assert [(i["image_name"], i["matched_text_index"], i["matched_sim"]) for i in found] == [
        ("a", 1, 0.8),
        ("b", 0, 0.9),
    ]
    assert given == record([[0.9, 0.8], [0.9, 0.1]], "ab")
    assert [i["matched_text_index"] for i in reassign(given, 2, "best")] == [0, 0]


def test_an_image_without_a_sentence_is_left_out():
    assert reassign(record([[], [], []]), 0, "linear") == []


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.1]], "similarity_matrix is not 3 images x 1 sentences"),
        ([[0.1], [0.2, 0.3], [0.1]], "similarity_matrix is not 3 images x 1 sentences"),
        ([[0.1], 0.2, [0.1]], "similarity_matrix is not 3 images x 1 sentences"),
        ([[0.1], ["0.2"], [0.1]], "an entry that is not a number"),
        ([[0.1], [True], [0.1]], "an entry that is not a number"),
        ([[0.1], [float("nan")], [0.1]], "an entry that is not below 1e"),
        ([[0.1], [10**400], [0.1]], "an entry that is not below 1e"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_a_reject(matrix, message):
    with pytest.raises(RejectError, match=f"json_type: .*{message}"):
        reassign(record(matrix), 1, "linear")


def test_an_entry_of_image_info_that_is_no_object_is_a_reject():
    with pytest.raises(RejectError, match="json_type: image_info has an entry that is not an object"):
        reassign({"image_info": ["x"], "similarity_matrix": [[0.5]]}, 1, "best")


def test_too_many_images_are_a_reject():
    with pytest.raises(RejectError, match="too_many_images: 101 images, at most 100"):
        reassign(record([[0.5]] * 101, ["x"] * 101), 1, "best")
