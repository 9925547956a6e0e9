"""Match images to sentences again, for corpora such as MMC4 that publish similarities of images and sentences."""

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_vlm.data.files.records import field
from megatron_vlm.data.rejects import RejectError

_MAX_IMAGES = 100  # time of the linear assignment grows with the square: 100 images take a few ms
_MAX_SIMILARITY = 1e6  # far above any cosine; also excludes NaN and integers too large for a float


def assign_each_best(similarity: np.ndarray) -> list[int | None]:
    """Return the most similar sentence of each image, by float64[images, sentences]; several images may share one."""
    return [int(index) for index in similarity.argmax(axis=1)] if similarity.size else [None] * len(similarity)


def assign_linear(similarity: np.ndarray) -> list[int | None]:
    """Assign a different sentence to each image for the highest sum of similarities, float64[images, sentences].

    If there are more images than sentences, each sentence gets a different image, and the remaining images get their
    most similar sentence, as in MMC4's own assignment. An image gets None only if there are no sentences.

    Source: MMC4, arXiv:2304.06939, section 3, and its scripts/compute_assignments.py.
    """
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, which others do not need

    found = assign_each_best(similarity)
    for image, sentence in zip(*linear_sum_assignment(similarity, maximize=True), strict=True):
        found[image] = int(sentence)
    return found


ASSIGNMENTS: dict[str, Callable[[np.ndarray], list[int | None]]] = {"linear": assign_linear, "best": assign_each_best}


def reassign(record: dict[str, Any], num_sentences: int, assignment: str) -> list[dict[str, Any]]:
    """Return `image_info` with `matched_text_index` and `matched_sim` computed from `similarity_matrix`.

    Args:
        record: has `image_info` and `similarity_matrix`, one row per image and one column per sentence.
        num_sentences: sentences of the record.
        assignment: one of `ASSIGNMENTS`.

    Returns:
        The images, in their order, without those that get no sentence; the record is not changed.

    Raises:
        RejectError: the matrix is missing, has another shape or non-finite numbers, or there are too many images.
    """
    infos, rows = field(record, "image_info", list), field(record, "similarity_matrix", list)
    if not all(isinstance(info, dict) for info in infos):
        raise RejectError("json_type", "image_info has an entry that is not an object")
    if len(infos) > _MAX_IMAGES:
        raise RejectError("too_many_images", f"{len(infos)} images, at most {_MAX_IMAGES} are assigned")
    if len(rows) != len(infos) or not all(isinstance(row, list) and len(row) == num_sentences for row in rows):
        raise RejectError("json_type", f"similarity_matrix is not {len(infos)} images x {num_sentences} sentences")
    if not all(type(value) in (int, float) for row in rows for value in row):
        raise RejectError("json_type", "similarity_matrix has an entry that is not a number")
    if not all(abs(value) < _MAX_SIMILARITY for row in rows for value in row):
        raise RejectError("json_type", f"similarity_matrix has an entry that is not below {_MAX_SIMILARITY:g}")
    similarity = np.array(rows, dtype=np.float64).reshape(len(infos), num_sentences)
    return [
        info | {"matched_text_index": sentence, "matched_sim": float(similarity[image, sentence])}
        for image, (info, sentence) in enumerate(zip(infos, ASSIGNMENTS[assignment](similarity), strict=True))
        if sentence is not None
    ]
