"""Vision towers, one module each, chosen by `model.vision.type`; a module defines the frozen dataclass `Config`.

The module of the same name in `models/towers/` builds the tower.
"""

from typing import Annotated, Protocol, runtime_checkable

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.loading import TypeIn
from megatron_vlm.config.operations import Operations


class TowerConfig(Protocol):
    """Settings of a tower, and what follows from them: patches, parameters, operations and activations."""

    @property
    def type(self) -> str:
        """Name of the module."""

    @property
    def image_size(self) -> int:
        """Side of the square input image [pixels]."""

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of red, green and blue, subtracted from pixels in the range 0 to 1."""

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Standard deviation of red, green and blue, by which the difference is divided."""

    @property
    def init_method_std(self) -> float:
        """Standard deviation of the initial weights, including the projection."""

    @property
    def feature_size(self) -> int:
        """Width of the output features."""

    @property
    def constant_grid(self) -> Grid | None:
        """Patches of every image; None if they depend on the image size."""

    def patch_grid(self, width: int, height: int) -> Grid:
        """Return the patches of a stored image of this size [pixels]."""

    @property
    def parameter_sizes(self) -> dict[str, int]:
        """Size of every parameter by its name in the built tower, in the order of the forward pass."""

    @property
    def no_weight_decay(self) -> tuple[str, ...]:
        """Names of parameters without weight decay, beside all of one dimension; patterns as in `training.freeze`."""

    def check_tensor_parallel(self, size: int) -> None:
        """Check that the tower can be split over `size` ranks, as `parallel.vision_tensor_parallel` asks for.

        Raises:
            ConfigError: it cannot; names the setting that is in the way.
        """

    @property
    def split_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that are then split; patterns as in `training.freeze`."""

    def summed_numbers(self, patches: Grid) -> int:
        """Return how many numbers these ranks add up for one image in a forward pass; in a backward pass, as many."""

    def operations(self, patches: Grid) -> Operations:
        """Return the operations for one image with these patches."""

    def activations(
        self, patches: Grid, *, learns: bool, recompute: bool, tensor_parallel_size: int = 1
    ) -> Activations:
        """Return the activations for one image with these patches.

        Args:
            patches: of the image.
            learns: whether the weights get gradients; otherwise only those of an adapter inside the tower do.
            recompute: whether the layers are computed again in the backward pass.
            tensor_parallel_size: ranks over which the tower is split; what follows is for one of them.
        """


@runtime_checkable
class TowerWrapper(Protocol):
    """A tower around another one, which has all the weights, under the keys that they have without the wrapper."""

    @property
    def tower(self) -> TowerConfig:
        """Settings of the inner tower."""


def innermost(tower: TowerConfig) -> TowerConfig:
    """Return the settings of the tower that has the weights: `tower` itself, or the one inside its wrappers."""
    return innermost(tower.tower) if isinstance(tower, TowerWrapper) else tower


Tower = Annotated[
    TowerConfig,
    TypeIn("megatron_vlm.config.towers", default="clip", presets="megatron_vlm.config.presets.vision"),
]
"""Annotation for a settings field that holds a tower."""
