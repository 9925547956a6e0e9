"""A CLIP-style vision transformer: square images of one size, one feature per patch."""

from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.checks import check_heads, check_positive
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes of the encoder and of its input image."""

    type: Literal["clip"] = "clip"
    image_size: int = 336
    """Side of the square input image [pixels]."""
    patch_size: int = 14
    """Side of a square patch [pixels]."""
    num_layers: int
    """Layers of the published encoder; `feature_layer` determines how many of them run."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    feature_layer: int = -2
    """Which hidden state is the output, counted as in Hugging Face: -1 is the output of the last layer."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    class_token: bool = True
    """Whether the encoder has a class token; its feature is never part of the output."""
    pre_norm: bool = True
    """Whether there is a norm between the embeddings and the first layer, as in CLIP."""
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    """Standard deviation of the initial weights, including the projection."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        check_positive("model.vision", self, *sizes)
        check_heads("model.vision", self.hidden_size, self.num_attention_heads, None)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.vision.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}",
                fix="choose a multiple",
            )
        if not 1 <= self.num_layers_run <= self.num_layers:
            raise ConfigError(
                f"model.vision.feature_layer={self.feature_layer} is not a layer of {self.num_layers}",
                fix=f"choose -1 to {-self.num_layers}",
            )

    @property
    def num_layers_run(self) -> int:
        """Layers up to the chosen hidden state."""
        return self.num_layers + 1 + self.feature_layer

    @property
    def feature_size(self) -> int:
        """Width of the output features."""
        return self.hidden_size

    @property
    def constant_grid(self) -> Grid:
        """Patches of every image, as a grid."""
        side = self.image_size // self.patch_size
        return Grid(side, side)

    @property
    def num_patches(self) -> int:
        """Number of patches of every image."""
        return self.constant_grid.size

    def patch_grid(self, width: int, height: int) -> Grid:
        """Return the patches of an image; the same for all sizes, because every image is first made square."""
        return self.constant_grid

    @property
    def num_parameters(self) -> int:
        """Parameters of the embeddings and the layers that run."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        layer = 4 * hidden * hidden + 2 * hidden * ffn + 9 * hidden + ffn
        class_tokens = int(self.class_token)
        patches = 3 * self.patch_size**2 * hidden + (0 if self.class_token else hidden)
        positions = (self.num_patches + class_tokens) * hidden
        norm = 2 * hidden if self.pre_norm else 0
        return self.num_layers_run * layer + patches + positions + class_tokens * hidden + norm

    def operations(self, patches: Grid) -> Operations:
        """Return the operations for one image with these patches."""
        hidden, tokens, layers = self.hidden_size, patches.size + int(self.class_token), self.num_layers_run
        weights = 4 * hidden * hidden + 2 * hidden * self.ffn_hidden_size
        return Operations(
            entry=2 * patches.size * 3 * self.patch_size**2 * hidden,
            inner=layers * 2 * tokens * weights,
            attention=layers * 4 * tokens * tokens * hidden,
        )

    def activations(self, patches: Grid, *, learns: bool, recompute: bool) -> Activations:
        """Return the activations for one image, with flash attention."""
        hidden, ffn, tokens = self.hidden_size, self.ffn_hidden_size, patches.size + int(self.class_token)
        # Inputs of the two norms and of the GELU, query, key, value and output of attention; inputs of the matrices.
        kept = 6 * hidden + ffn + (2 * hidden + ffn if learns else 0)
        layer = Activations(kept=tokens * kept, working=tokens * (2 * ffn + hidden))
        layers = layer.times(self.num_layers_run)
        if recompute:
            layers = layer.recomputed(self.num_layers_run, tokens * hidden)
        pixels = patches.size * 3 * self.patch_size**2 if learns else 0
        embeddings = tokens * hidden if self.pre_norm else 0
        return Activations(kept=layers.kept + pixels + embeddings, working=layers.working)
