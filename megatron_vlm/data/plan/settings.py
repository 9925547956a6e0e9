"""All settings that a plan depends on."""

from dataclasses import dataclass

from megatron_vlm.config import BlendEntry, TrainConfig
from megatron_vlm.config.blend import datasets_of
from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.data.plan.sample_pool import Overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """All settings that a plan depends on."""

    blend: tuple[BlendEntry, ...]
    seq_length: int
    image_tokens: ImageTokens
    packing: bool
    overflow: Overflow
    seed: int
    global_batch_size: int
    train_iters: int | None
    train_epochs: float | None
    sample_multiple: int = 1
    length_clustering: bool = False
    length_multiple: int = 64
    max_images_per_row: int | None = None

    @property
    def datasets(self) -> tuple[BlendEntry, ...]:
        """One entry for each dataset of the blend, in the order of their ids."""
        return datasets_of(self.blend)

    @classmethod
    def from_config(cls, config: TrainConfig) -> "PlanSettings":
        """Take them from the settings of a run."""
        return cls(
            blend=config.data.blend,
            seq_length=config.data.seq_length,
            image_tokens=ImageTokens.from_model(config.model),
            packing=config.data.packing,
            overflow=config.data.overflow,
            seed=config.training.seed,
            global_batch_size=config.training.global_batch_size,
            train_iters=config.training.train_iters,
            train_epochs=config.training.train_epochs,
            sample_multiple=config.data.sample_multiple,
            length_clustering=config.data.length_clustering,
            length_multiple=config.data.length_multiple,
            max_images_per_row=config.data.max_images_per_row,
        )
