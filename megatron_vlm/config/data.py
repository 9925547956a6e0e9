"""Which shards are trained on, in which proportion and how they are packed."""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.checks import check_not_negative, check_positive
from megatron_vlm.config.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendEntry:
    """One prepared dataset and how much of it is used; at most one of weight, epochs and images is set."""

    path: str
    """Folder that `prepare` wrote."""
    weight: float | None = None
    """Share of the samples of the whole blend, relative to the other weights."""
    epochs: float | None = None
    """Passes over the dataset; a fraction takes that part of a shuffled pass."""
    images: float | None = None
    """Share of the images of the whole blend, relative to the other shares (the paper: 1:1)."""

    def __post_init__(self) -> None:
        given = [name for name in ("weight", "epochs", "images") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"blend entry {self.path} sets {' and '.join(given)}", fix="keep one of them")
        if given and getattr(self, given[0]) <= 0:
            raise ConfigError(f"blend entry {self.path} has {given[0]} <= 0", fix="give a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """From prepared shards to packed rows."""

    tokenizer: str
    """SentencePiece model file; its sha256 must be that of the shards."""
    blend: tuple[BlendEntry, ...]
    """Datasets; entries without a proportion are used for one epoch each."""
    validation: tuple[BlendEntry, ...] = ()
    """Datasets of the validation loss, used as in `blend`; empty: no validation."""
    seq_length: int
    """Length of a packed row, image tokens included [tokens]."""
    packing: bool = True
    """Several samples a row, each with its own attention and positions; False: one sample a row."""
    overflow: Literal["truncate", "split", "drop", "fail"] = "truncate"
    """What is done with a sample longer than a row: cut it after the last whole image and token that fit; make it
    several samples, each as long as fits, images kept whole and no token lost (what crosses a cut is not seen, and the
    first token behind it has no loss); leave it out, counted; or refuse to start."""
    sample_multiple: int = 1
    """Every sample starts at a multiple of it in its row; the padding between two samples belongs to the first one's
    segment and has no loss [tokens]. Context parallelism needs 2 * context_parallel_size. FP8 needs 16 (32 with MXFP8)
    of a whole micro-batch, which seq_length settles, and of every sample only where kernels work sample by sample."""
    length_clustering: bool = False
    """Without packing: samples of similar length share a global batch, and its rows are as long as the longest of them,
    rounded up to `length_multiple`."""
    length_multiple: int = 64
    """Row lengths of `length_clustering` are multiples of it [tokens]."""
    image_aspect: Literal["pad", "square", "resize"] = "pad"
    """How an image becomes a square: pad with the mean colour; crop the centre (CLIP's own); stretch."""
    num_workers: int = 2
    """Decoding processes of each rank that needs images; 0 decodes in the training process."""
    prefetch_factor: int = 4
    """Micro-batches that each worker keeps ready."""

    def __post_init__(self) -> None:
        if not self.blend:
            raise ConfigError("data.blend is empty", fix="name at least one prepared dataset")
        _check_proportions("data.blend", self.blend)
        _check_proportions("data.validation", self.validation)
        check_positive("data", self, "seq_length", "prefetch_factor", "sample_multiple", "length_multiple")
        check_not_negative("data", self, "num_workers")
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
                "data.length_clustering is for rows of one sample, data.packing fills rows with several",
                fix="turn one of them off",
            )
        if self.length_clustering and self.length_multiple % multiple:
            raise ConfigError(
                f"data.length_multiple={self.length_multiple} is not a multiple of data.sample_multiple={multiple}",
                fix=f"set data.length_multiple={-(-self.length_multiple // multiple) * multiple}",
            )


def _check_proportions(section: str, blend: tuple[BlendEntry, ...]) -> None:
    kinds = {
        "epochs" if entry.weight is None and entry.images is None else "weight" if entry.weight else "images"
        for entry in blend
    }
    if len(kinds) > 1:
        raise ConfigError(
            f"{section} mixes {', '.join(sorted(kinds))}", fix="use one kind of proportion for all entries"
        )
