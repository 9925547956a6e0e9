"""Pack samples into a micro-batch, and decode this rank's share of its images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megatron_vlm.config import IGNORE_INDEX, DataConfig, DataError, ModelConfig
from megatron_vlm.config.prepare import ImageLimits
from megatron_vlm.data.loading.batch import BadImage, ContextBatch, VLMBatch
from megatron_vlm.data.loading.pixels import Aspect, decode_image, mean_colour
from megatron_vlm.data.plan.fragments import take_fragment
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.samples import EncodedSample, ImageSegment
from megatron_vlm.parallel.slicing import ContextShare, ContextSlice, ImageShare, PackedBatch, slice_batch

_ALL_POSITIONS = ContextShare()
_MAX_SEQLEN_MULTIPLE = 64
# `prepare` applies the user's limits; an image that it accepted must not end a run.
_NO_LIMITS = ImageLimits(max_pixels=1 << 40, min_side=1, max_aspect_ratio=float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Collation:
    """What a micro-batch depends on besides its samples."""

    seq_length: int
    """Length of a row [tokens]."""
    image_tokens: ImageTokens
    """Placeholders of an image."""
    vocab_size: int
    """Token ids are below it."""
    image_token_id: int
    pad_token_id: int
    image_size: int
    """Side of the decoded images [pixels]."""
    image_aspect: Aspect
    image_mean: tuple[float, float, float]
    max_images_per_row: int | None = None
    """Most images of a row; None: any number."""
    sample_multiple: int = 1
    """Every sample starts at a multiple of it within its row; seq_length is a multiple of it [tokens]."""
    position_multiple: int | None = None
    """Leave out the positions behind the last sample of each row, and fill the micro-batch up to a multiple of it
    [tokens]; None: every row has all its positions."""
    replaces_bad_images: bool = False
    """Put a blank image in the place of one that cannot be read; otherwise it is an error."""

    @classmethod
    def from_config(cls, model: ModelConfig, data: DataConfig, position_multiple: int | None = None) -> "Collation":
        """Collect it from a run's settings; see `config.position_multiple`."""
        return cls(
            seq_length=data.seq_length,
            image_tokens=ImageTokens.from_model(model),
            vocab_size=model.language.vocab_size,
            image_token_id=model.language.image_token_id,
            pad_token_id=model.language.pad_token_id,
            image_size=model.vision.image_size,
            image_aspect=data.image_aspect,
            image_mean=model.vision.image_mean,
            max_images_per_row=data.max_images_per_row,
            sample_multiple=data.sample_multiple,
            position_multiple=position_multiple,
            replaces_bad_images=data.max_bad_fraction > 0,
        )


@dataclass(frozen=True, slots=True)
class PlacedSample:
    """A sample and where it comes from."""

    sample: EncodedSample
    sample_id: int
    """Global id of the plan."""
    dataset: int
    """Index of its blend entry."""
    where: str
    """Dataset, shard and sample, for error messages."""
    is_beginning: bool = True
    """Whether it is a sample or its first fragment, and not a later one."""


def collate(
    rows: Sequence[Sequence[PlacedSample]],
    collation: Collation,
    image_share: ImageShare | None,
    context_share: ContextShare = _ALL_POSITIONS,
) -> VLMBatch:
    """Concatenate rows to one packed sequence, with all positions of each row or without those behind its last sample.

    A sample longer than a row, or with more images, is cut after the last whole image and the last token that fit.
    The padding up to the next multiple belongs to the sample's own segment, so that all borders are multiples:
    attention is causal, so it changes nothing before it.

    A blank image, of the tower's mean colour, may stand in the place of one that cannot be read. It takes the same
    positions, none of which has a loss, and the text stays as it is: so only the rank that decodes it has to know.

    Args:
        rows: the samples of each row, in order; a row may be empty.
        collation: sizes and ids.
        image_share: which images are decoded; None: none, and pixel_values is None.
        context_share: whose positions the batch has.

    Raises:
        DataError: a sample has a token outside the vocabulary or an image that cannot be decoded, or a row is too
            short for its samples; names dataset, shard and sample.
    """
    packed = _PackedRows(collation)
    for row in rows:
        packed.add_row(row)
    mine = slice_batch(packed.close(), image_share, context_share)
    pixels, bad_images = (None, ()) if image_share is None else _decode(mine.images, collation)
    return VLMBatch(
        input_ids=torch.from_numpy(mine.input_ids)[None],
        labels=torch.from_numpy(mine.labels)[None],
        cu_seqlens=torch.from_numpy(mine.cu_seqlens),
        max_seqlen=_choose_max_seqlen(np.diff(mine.cu_seqlens)),
        label_index=torch.from_numpy(mine.label_index),
        label_datasets=torch.from_numpy(mine.label_datasets),
        image_token_index=torch.from_numpy(mine.image_token_index),
        num_images=mine.num_images,
        image_lengths=mine.image_lengths,
        pixel_values=pixels,
        bad_images=bad_images,
        sample_ids=torch.tensor(packed.sample_ids, dtype=torch.int64),
        samples_per_row=torch.tensor([len(row) for row in rows], dtype=torch.int64),
        dataset_samples=packed.dataset_samples,
        dataset_tokens=packed.dataset_tokens,
        num_tokens=packed.dataset_tokens.total(),
        num_positions=len(rows) * collation.seq_length,
        attention_pairs=packed.attention_pairs,
        context=None if mine.context is None else _context_batch(mine.context),
    )


def _context_batch(context: ContextSlice) -> ContextBatch:
    return ContextBatch(
        position_ids=torch.from_numpy(context.position_ids),
        key_index=torch.from_numpy(context.key_index),
        key_cu_seqlens=torch.from_numpy(context.key_cu_seqlens),
        max_keys=_choose_max_seqlen(np.diff(context.key_cu_seqlens)),
        image_index=torch.from_numpy(context.image_index),
    )


def cut_sample(
    sample: EncodedSample, max_tokens: int, image_tokens: ImageTokens, max_images: int | None = None
) -> EncodedSample:
    """Return the beginning of a sample: whole images and as many tokens as fit, up to the first image that does not."""
    end = num_images = 0
    for segment in sample.segments:
        size = image_tokens.of_segment(segment)
        if isinstance(segment, ImageSegment):
            if end + size > max_tokens or num_images == max_images:
                break
            num_images += 1
        end = min(end + size, max_tokens)
    return take_fragment(sample, 0, end, image_tokens)


class _Image(NamedTuple):
    """An image of a micro-batch, before it is decoded."""

    segment: ImageSegment
    sample: PlacedSample
    place: int
    """Counted within the sample."""


class _PackedRows:
    """Segments of a micro-batch in reading order, padding included."""

    def __init__(self, collation: Collation) -> None:
        self.collation = collation
        self.ids: list[np.ndarray] = []
        self.trained: list[bool] = []
        self.borders = [0]
        self.datasets: list[int] = []
        self.sample_ids: list[int] = []
        self.dataset_samples: Counter[int] = Counter()
        self.dataset_tokens: Counter[int] = Counter()
        self.images: list[_Image] = []
        self.attention_pairs = 0
        self.image_lengths: list[int] = []

    def add_row(self, row: Sequence[PlacedSample]) -> None:
        left = self.collation.seq_length
        for placed in row:
            size = self._add_sample(placed)
            left -= size
            if left < 0:
                raise DataError(
                    f"samples of a row have {-left} tokens more than its length of {self.collation.seq_length}",
                    where=placed.where,
                    fix="the shards changed since the plan was made: delete the plan",
                )
            padding = min(-size % self.collation.sample_multiple, left)
            self._close_segment(size, padding, placed.dataset)
            left -= padding
            self.sample_ids.append(placed.sample_id)
            self.dataset_samples[placed.dataset] += placed.is_beginning
            self.dataset_tokens[placed.dataset] += size
            self.attention_pairs += size * (size + 1) // 2
        if self.collation.position_multiple is None:
            self._close_segment(0, left, dataset=0)

    def close(self) -> PackedBatch[_Image]:
        """Return the whole micro-batch."""
        if self.collation.position_multiple is not None:
            # Rows without samples still need a position: a layer without one has no output to train on.
            missing = -self.borders[-1] % self.collation.position_multiple
            self._close_segment(0, missing or (0 if self.ids else self.collation.position_multiple), dataset=0)
        ids = np.concatenate(self.ids, dtype=np.int64)
        borders = np.array(self.borders, dtype=np.int32)
        is_target = np.repeat(self.trained, list(map(len, self.ids)))
        # The first token (BOS) has no predecessor in its sample that could predict it.
        is_target[borders[:-1]] = False
        label_index = np.flatnonzero(is_target[1:])
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        labels[label_index] = ids[label_index + 1]
        return PackedBatch(
            input_ids=ids,
            labels=labels,
            cu_seqlens=borders,
            label_index=label_index,
            label_datasets=np.repeat(self.datasets, np.diff(borders))[label_index],
            image_token_index=np.flatnonzero(ids == self.collation.image_token_id),
            num_images=len(self.images),
            image_lengths=tuple(self.image_lengths) if self.collation.image_tokens.constant is None else None,
            images=self.images,
        )

    def _add_sample(self, placed: PlacedSample) -> int:
        collation, size, num_images = self.collation, 0, 0
        cut = cut_sample(placed.sample, collation.seq_length, collation.image_tokens, collation.max_images_per_row)
        for segment in cut.segments:
            if isinstance(segment, ImageSegment):
                self.image_lengths.append(collation.image_tokens.of_image(segment.size))
                self._add(np.full(self.image_lengths[-1], collation.image_token_id), trained=False)
                self.images.append(_Image(segment, placed, num_images))
                num_images += 1
            else:
                self._check_ids(segment.input_ids, placed.where)
                self._add(segment.input_ids, segment.train)
            size += len(self.ids[-1])
        return size

    def _add(self, ids: np.ndarray, trained: bool) -> None:
        self.ids.append(ids)
        self.trained.append(trained)

    def _close_segment(self, size: int, padding: int, dataset: int) -> None:
        if padding:
            self._add(np.full(padding, self.collation.pad_token_id), trained=False)
        if size + padding:
            self.borders.append(self.borders[-1] + size + padding)
            self.datasets.append(dataset)

    def _check_ids(self, ids: np.ndarray, where: str) -> None:
        # A vocabulary-parallel embedding turns ids out of range into zeros without an error.
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.collation.vocab_size:
            what = f"token ids reach from {low} to {high}, the vocabulary has {self.collation.vocab_size}"
            raise DataError(what, where=where, fix="prepare the dataset with the tokenizer of the model")


def _choose_max_seqlen(sizes: np.ndarray) -> int:
    """Round the longest segment up, so that few distinct values occur: megatron-core caches a RoPE table for each."""
    return -(-int(sizes.max()) // _MAX_SEQLEN_MULTIPLE) * _MAX_SEQLEN_MULTIPLE


def _decode(images: Sequence[_Image], collation: Collation) -> tuple[torch.Tensor, tuple[BadImage, ...]]:
    side = collation.image_size
    pixels = np.empty((len(images), 3, side, side), dtype=np.uint8)
    bad: list[BadImage] = []
    for position, image in enumerate(images):
        try:
            pixels[position] = _decode_one(image.segment, collation)
        except DataError as error:
            sample = image.sample
            if not collation.replaces_bad_images:
                fix = "prepare the dataset again without this image"
                raise DataError(error.what, where=sample.where, fix=fix) from None
            pixels[position] = mean_colour(collation.image_mean).reshape(3, 1, 1)
            bad.append(
                BadImage(
                    sample_id=sample.sample_id,
                    dataset=sample.dataset,
                    where=sample.where,
                    image=image.place,
                    reason=error.what,
                )
            )
    return torch.from_numpy(pixels), tuple(bad)


def _decode_one(image: ImageSegment, collation: Collation) -> np.ndarray:
    if image.fault is not None:
        raise DataError(image.fault, fix="run data verify on the dataset")
    return decode_image(
        image.encoded,
        image_size=collation.image_size,
        aspect=collation.image_aspect,
        mean=collation.image_mean,
        limits=_NO_LIMITS,
    )
