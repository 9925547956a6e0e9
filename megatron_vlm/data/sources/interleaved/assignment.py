"""Match images to sentences anew from their similarities, for corpora such as MMC4 that publish them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_vlm.data.files.records import field
from megatron_vlm.data.rejects import RejectError

_MAX_IMAGES = 100  # the time of the linear assignment grows with the square of it: 100 take a few ms
_MAX_SIMILARITY = 1e6  # of cosines; refuses NaN and integers too long for a float as well


def assign_each_best(similarity: np.ndarray) -> list[int | None]:
    """Return the most similar sentence of each image; several images may have the same one.

    Args:
        similarity: float64[images, sentences].
    """
    return [int(index) for index in similarity.argmax(axis=1)] if similarity.size else [None] * len(similarity)


def assign_linear(similarity: np.ndarray) -> list[int | None]:
    """Return a sentence of its own for each image such that the sum of the similarities is the highest.

    Where there are more images than sentences, each sentence has an image of its own, and the images that are left
    over go to their most similar sentence, as in MMC4's own assignment.

    Args:
        similarity: float64[images, sentences].

    Returns:
        The sentence of each image; None only if there are no sentences.

    Source: MMC4, arXiv:2304.06939, section 3, and its scripts/compute_assignments.py; Kuhn's Hungarian method with
    shortest augmenting paths, in O(images^2 * sentences).
    """
    images, sentences = similarity.shape
    if images > sentences:
        found = assign_each_best(similarity)
        for sentence, image in enumerate(_assign_all(similarity.T)):
            found[image] = sentence
        return found
    return list(_assign_all(similarity))


def _assign_all(similarity: np.ndarray) -> list[int]:
    """Return a column of its own for each row; there are at least as many columns as rows."""
    images, sentences = similarity.shape
    # Column 0 is no sentence: it holds the image that is looking for one.
    image_price, price = np.zeros(images), np.zeros(sentences + 1)
    owner = np.full(sentences + 1, -1)
    for image in range(images):
        owner[0] = image
        end, came_from = _find_free(-similarity, owner, image_price, price)
        while end:
            owner[end] = owner[came_from[end]]
            end = int(came_from[end])
    matched = {int(image): sentence for sentence, image in enumerate(owner[1:]) if image >= 0}
    return [matched[image] for image in range(images)]


def _find_free(
    cost: np.ndarray, owner: np.ndarray, image_price: np.ndarray, price: np.ndarray
) -> tuple[int, np.ndarray]:
    """Walk the cheapest path from column 0 to a column without owner; adjusts the prices.

    Returns:
        The free column, and for each column the one before it on the path.
    """
    came_from = np.zeros(len(owner), dtype=np.int64)
    distance = np.full(len(owner), np.inf)
    seen = np.zeros(len(owner), dtype=bool)
    column = 0
    while owner[column] >= 0:
        seen[column] = True
        image = owner[column]
        reach = cost[image] - image_price[image] - price[1:]
        closer = ~seen[1:] & (reach < distance[1:])
        distance[1:][closer] = reach[closer]
        came_from[1:][closer] = column
        following = int(np.where(seen, np.inf, distance).argmin())
        step = distance[following]
        image_price[owner[seen]] += step
        price[seen] -= step
        distance[~seen] -= step
        column = following
    return column, came_from


ASSIGNMENTS: dict[str, Callable[[np.ndarray], list[int | None]]] = {"linear": assign_linear, "best": assign_each_best}


def reassign(record: dict[str, Any], num_sentences: int, assignment: str) -> list[dict[str, Any]]:
    """Return `image_info` with `matched_text_index` and `matched_sim` as `similarity_matrix` gives them.

    Args:
        record: has `image_info` and `similarity_matrix`, one row per image and one column per sentence.
        num_sentences: sentences of the record.
        assignment: one of `ASSIGNMENTS`.

    Returns:
        The images, in their order, without those that get no sentence; the record stays as it is.

    Raises:
        RejectError: the matrix is missing, of another shape or not of finite numbers; or there are too many images.
    """
    infos, rows = field(record, "image_info", list), field(record, "similarity_matrix", list)
    if not all(isinstance(info, dict) for info in infos):
        raise RejectError("json_type", "image_info has an entry that is no object")
    if len(infos) > _MAX_IMAGES:
        raise RejectError("too_many_images", f"{len(infos)} images, at most {_MAX_IMAGES} are assigned")
    if len(rows) != len(infos) or not all(isinstance(row, list) and len(row) == num_sentences for row in rows):
        raise RejectError("json_type", f"similarity_matrix is not of {len(infos)} images x {num_sentences} sentences")
    if not all(type(value) in (int, float) for row in rows for value in row):
        raise RejectError("json_type", "similarity_matrix has an entry that is no number")
    if not all(abs(value) < _MAX_SIMILARITY for row in rows for value in row):
        raise RejectError("json_type", f"similarity_matrix has an entry that is not below {_MAX_SIMILARITY:g}")
    similarity = np.array(rows, dtype=np.float64).reshape(len(infos), num_sentences)
    return [
        info | {"matched_text_index": sentence, "matched_sim": float(similarity[image, sentence])}
        for image, (info, sentence) in enumerate(zip(infos, ASSIGNMENTS[assignment](similarity), strict=True))
        if sentence is not None
    ]
