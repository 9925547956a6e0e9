"""One micro-batch as the model sees it, and which rank decodes which of its images."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config import IGNORE_INDEX, LanguageConfig


@dataclass(frozen=True, slots=True)
class ImageShare:
    """The part of a micro-batch's images that one rank of a group encodes.

    With k = ceil(num_images / size), the rank owns the images [rank * k, min((rank + 1) * k, num_images)): every rank
    but the last ones has the same number, so that an all-gather of k images a rank needs no sizes.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"image share {self.rank} of {self.size} does not exist; ranks count from 0")

    def images_per_rank(self, num_images: int) -> int:
        """Images of a full share; the last shares may have fewer."""
        return -(-num_images // self.size)

    def bounds(self, num_images: int) -> tuple[int, int]:
        """First image of this rank and the one after its last, out of `num_images` in reading order."""
        share = self.images_per_rank(num_images)
        first = min(self.rank * share, num_images)
        return first, min(first + share, num_images)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VLMBatch:
    """One micro-batch: its rows laid one after the other in one packed sequence of t positions.

    Every sample is an attention segment of its own, and so is the padding at the end of a row: the segments cover all t
    positions. t is micro_batch_size * seq_length. With `sample_multiple`, a sample's segment ends with padding up to
    the next multiple.
    """

    input_ids: Tensor
    """int64[1, t]; the image placeholder at image positions, the padding id at padding."""
    labels: Tensor
    """int64[1, t]; already shifted, IGNORE_INDEX where there is no loss."""
    position_ids: Tensor
    """int64[1, t]; from 0 in every segment."""
    cu_seqlens: Tensor
    """int32[n + 1]; segment borders, from 0 to t."""
    max_seqlen: int
    """At least the longest segment, rounded up; see `collate`. [tokens]"""
    label_index: Tensor
    """int64[k]; flat positions that have a loss, ascending."""
    label_sources: Tensor
    """int64[k]; blend entry that each of them comes from."""
    image_token_index: Tensor
    """int64[num_images * num_image_tokens]; flat positions of the placeholders, image by image in reading order."""
    num_images: int
    """Images of the whole micro-batch, over all shares."""
    pixel_values: Tensor | None
    """uint8[share, 3, height, width]; this rank's share of the images. None where the stage needs no pixels."""
    sample_ids: Tensor
    """int64[num_samples]; in the order of their segments; as the plan counts them, pieces of long samples included."""
    num_tokens: int
    """Positions that are not padding."""

    @property
    def loss_mask(self) -> Tensor:
        """float32[1, t]; 1 where the loss counts."""
        return (self.labels != IGNORE_INDEX).float()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VLMBatch":
        """Return the batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "VLMBatch":
        """Return the batch in page-locked memory; torch's DataLoader calls it before a copy to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "VLMBatch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)

    def validate(self, language: LanguageConfig, num_image_tokens: int, image_share: ImageShare | None) -> None:
        """Check on the host that the fields agree with each other; for tests and for data of unknown origin.

        Args:
            language: names the placeholder, the padding and the vocabulary.
            num_image_tokens: placeholders of one image.
            image_share: the share that was asked for; None: no pixels.

        Raises:
            ValueError: two fields disagree; names them with the numbers.
        """
        self._validate_segments()
        self._validate_ids(language)
        self._validate_images(language, num_image_tokens, image_share)

    def _validate_segments(self) -> None:
        size = self.input_ids.shape[1]
        for name in ("input_ids", "labels", "position_ids"):
            shape = tuple(getattr(self, name).shape)
            if shape != (1, size):
                raise ValueError(f"{name} has shape {shape}, expected {(1, size)}")
        borders = self.cu_seqlens.long()
        lengths = borders.diff()
        if borders[0] != 0 or borders[-1] != size or (lengths <= 0).any():
            raise ValueError(f"cu_seqlens does not ascend from 0 to {size}: {borders.tolist()[:16]}")
        if int(lengths.max()) > self.max_seqlen:
            raise ValueError(f"longest segment has {int(lengths.max())} tokens, max_seqlen is {self.max_seqlen}")
        expected = torch.arange(size) - borders[:-1].repeat_interleave(lengths)
        if not torch.equal(self.position_ids[0].long(), expected):
            raise ValueError("position_ids do not restart at 0 in every segment")
        if not 0 <= self.num_tokens <= size:
            raise ValueError(f"num_tokens is {self.num_tokens}, the batch has {size} positions")

    def _validate_ids(self, language: LanguageConfig) -> None:
        low, high = int(self.input_ids.min()), int(self.input_ids.max())
        if low < 0 or high > language.pad_token_id:
            raise ValueError(f"input_ids reach from {low} to {high}; ids end at {language.pad_token_id}")
        trained = (self.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
        if not torch.equal(self.label_index, trained):
            raise ValueError(f"label_index has {len(self.label_index)} entries, labels have {len(trained)} with a loss")
        if len(self.label_sources) != len(self.label_index):
            raise ValueError(f"{len(self.label_sources)} label_sources for {len(self.label_index)} labels")
        if (self.labels[0, trained] >= language.vocab_size).any():
            raise ValueError(f"a label is not a token below {language.vocab_size}")
        last = self.cu_seqlens.long()[1:] - 1
        if (self.labels[0, last] != IGNORE_INDEX).any():
            raise ValueError("the last position of a segment has a label, which is of another sample")

    def _validate_images(self, language: LanguageConfig, num_image_tokens: int, image_share: ImageShare | None) -> None:
        placeholders = (self.input_ids[0] == language.image_token_id).nonzero()[:, 0]
        if not torch.equal(self.image_token_index, placeholders):
            raise ValueError(
                f"image_token_index has {len(self.image_token_index)} entries, "
                f"input_ids {len(placeholders)} placeholders"
            )
        if len(placeholders) != self.num_images * num_image_tokens:
            raise ValueError(
                f"{len(placeholders)} placeholders for {self.num_images} images of {num_image_tokens} tokens"
            )
        if image_share is None or self.pixel_values is None:
            if (image_share is None) != (self.pixel_values is None):
                raise ValueError("pixel_values and image_share must be given together")
            return
        first, last = image_share.bounds(self.num_images)
        if len(self.pixel_values) != last - first or self.pixel_values.dtype != torch.uint8:
            raise ValueError(
                f"pixel_values is {self.pixel_values.dtype}{list(self.pixel_values.shape)}, "
                f"expected uint8 of {last - first} images"
            )
