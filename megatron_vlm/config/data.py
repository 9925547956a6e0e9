"""Training data: the datasets, their proportions and how samples are packed into rows."""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.blend import BlendEntry, check_blend, steps_of
from megatron_vlm.config.checks import check_at_most, check_not_negative, check_path, check_positive
from megatron_vlm.config.errors import ConfigError

MAX_SEQ_LENGTH = 2**24
"""Longest row [tokens]."""
_MAX_WORKERS = 1024
"""Most decoding processes of a rank, and micro-batches that each prepares ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How prepared shards become packed rows."""

    tokenizer: str
    """A tokenizer.model, a tokenizer.json, or a folder that holds one. It must be the tokenizer that the shards were
    prepared with (compared by sha256)."""
    blend: tuple[BlendEntry, ...]
    """Datasets to train on; an entry without a proportion is used for one epoch. Entries with `from_iteration` or
    `from_tokens` take the place of those before; see `config/blend.py`."""
    validation: tuple[BlendEntry, ...] = ()
    """Datasets for the validation loss, mixed like `blend`; empty for no validation."""
    seq_length: int
    """Length of a packed row, including image tokens [tokens]."""
    packing: bool = True
    """Put several samples into a row, each with its own attention and positions; False for one sample per row."""
    overflow: Literal["truncate", "split", "drop", "fail"] = "truncate"
    """What happens to a sample longer than a row. truncate: cut after the last whole image or token that fits. split:
    make several samples, each as long as possible; images stay whole and no token is lost, but attention does not cross
    a cut, and the first token after it has no loss. drop: leave the sample out and count it. fail: refuse to start.
    What a cut leaves without a token that has a loss is left out and counted as nothing_to_train."""
    max_images_per_row: int | None = None
    """Most images of a row, which bounds the activations of the tower; null: as many as fit. A sample with more images
    is too long, and `overflow` decides about it: truncate and split cut before the first image too many."""
    sample_multiple: int = 1
    """Every sample starts at a multiple of this in its row; the padding between two samples belongs to the segment of
    the first and has no loss [tokens]. FP8 and context parallelism ask for multiples of the whole micro-batch only, so
    a suitable seq_length is enough for them unless kernels process samples one by one."""
    length_clustering: bool = False
    """Without packing: put samples of similar length into the same global batch, and make its rows only as long as the
    longest of them, rounded up to `length_multiple`."""
    length_multiple: int = 64
    """With `length_clustering`, row lengths are multiples of this [tokens]."""
    quarantine: str | None = None
    """A file of ids of samples, one a line, that are left out: they stay in the plan, and are not read. The ids are
    those of the ledger, and stay the same where steps are added to `blend`. The file may change at a resume."""
    image_aspect: Literal["pad", "square", "resize"] = "pad"
    """How an image becomes square. pad: add borders in the mean colour. square: crop the centre, like CLIP. resize:
    stretch."""
    num_workers: int = 2
    """Decoding processes per rank that needs images; with 0, the training process decodes."""
    prefetch_factor: int = 4
    """Micro-batches that each worker prepares ahead."""

    max_bad_fraction: float = 0.001
    """Part of the samples of a dataset whose images may be unreadable, because they are damaged or no image file. Each
    such image is replaced by a blank one, its sample's text stays, and `bad_samples.jsonl` in the run folder lists it;
    above this part, the run stops. With 0, it stops at the first one. Damaged text always stops it."""

    def __post_init__(self) -> None:
        if not self.blend:
            raise ConfigError("data.blend is empty", fix="name at least one prepared dataset")
        check_blend("data.blend", self.blend)
        check_blend("data.validation", self.validation)
        if len(steps_of(self.validation)) > 1:
            raise ConfigError("data.validation has steps, which only data.blend may have", fix="remove them")
        check_positive("data", self, "seq_length", "prefetch_factor", "sample_multiple", "length_multiple")
        if self.max_images_per_row is not None:
            check_positive("data", self, "max_images_per_row")
        check_not_negative("data", self, "num_workers", "max_bad_fraction")
        check_at_most("data", self, 1, "max_bad_fraction")
        check_path("data.tokenizer", self.tokenizer)
        check_path("data.quarantine", self.quarantine)
        check_at_most("data", self, MAX_SEQ_LENGTH, "seq_length", "sample_multiple", "length_multiple")
        check_at_most("data", self, _MAX_WORKERS, "num_workers", "prefetch_factor")
        self._check_multiples()

    def _check_multiples(self) -> None:
        multiple = self.sample_multiple
        if self.seq_length % multiple:
            lower = self.seq_length - self.seq_length % multiple
            raise ConfigError(
                f"data.seq_length={self.seq_length} is not a multiple of data.sample_multiple={multiple}",
                fix=f"set data.seq_length={lower or multiple}",
            )
        if self.length_clustering and self.packing:
            raise ConfigError(
                "data.length_clustering needs rows of one sample, but data.packing puts several into a row",
                fix="turn one of them off",
            )
        if self.length_clustering and self.length_multiple % multiple:
            raise ConfigError(
                f"data.length_multiple={self.length_multiple} is not a multiple of data.sample_multiple={multiple}",
                fix=f"set data.length_multiple={-(-self.length_multiple // multiple) * multiple}",
            )
