"""What the settings of all vision transformers share: sizes, and the quantities that follow from them.

A tower in `towers/` derives its `Config` from `VisionTransformerConfig` and says in `architecture` what is its own.

Source: ViT, arXiv:2010.11929.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.checks import check_heads, check_not_negative, check_positive, check_sizes
from megatron_vlm.config.comparison import FREE, IN_NEW_STAGE
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.grid import Grid
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import linear_sizes, norm_sizes, prefixed

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "swiglu"]
"""Activation of the MLP; with swiglu, its first layer has a gate beside it."""
_EMBEDDINGS = ("class_token", "position_embeddings.weight", "registers")
# The biases of the other two matrices are added behind the sum over the ranks.
_SPLIT = tuple(
    f"decoder.layers.*.{name}"
    for name in (
        "self_attention.linear_qkv",
        "self_attention.[qk]_layernorm",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1",
        "mlp.linear_fc2.weight",
    )
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Where vision transformers differ from one another, apart from their sizes."""

    activation: Activation
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    class_token: bool = True
    """Whether a learned token, with a position of its own, stands before the patches."""
    drop_class_token: bool = True
    """Whether the feature of the class token is left out of the output."""
    num_registers: int = 0
    """Learned tokens without a position between class token and patches; never part of the output."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    pre_norm: bool = False
    """Whether there is a norm between the embeddings and the first layer."""
    post_norm: bool = False
    """Whether there is a norm after the last layer that runs."""
    add_qkv_bias: bool = True
    qk_layernorm: bool = False
    """Whether queries and keys pass an RMSNorm over all heads together."""
    layer_scale: float | None = None
    """Initial value of the learned factors on the outputs of attention and MLP; None: no factors."""
    antialias_positions: bool = False
    """Whether position embeddings are smoothed when they are resized to a smaller grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTransformerConfig(ABC):
    """Sizes of a vision transformer and of its input: square images of one size."""

    type: str
    image_size: Annotated[int, IN_NEW_STAGE]
    """Side of the square input image [pixels]."""
    patch_size: int
    """Side of a square patch [pixels]."""
    num_layers: Annotated[int, IN_NEW_STAGE]
    """Layers of the published encoder; `feature_layer` determines how many of them run."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    feature_layer: Annotated[int, IN_NEW_STAGE]
    """Which hidden state is the output, counted as in Hugging Face: -1 is the output of the last layer."""
    layernorm_epsilon: float = 1e-6
    init_method_std: Annotated[float, FREE] = 0.02
    """Standard deviation of the initial weights, including the projection."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        check_positive("model.vision", self, *sizes)
        check_positive("model.vision", self, "layernorm_epsilon")
        check_not_negative("model.vision", self, "init_method_std")
        check_sizes("model.vision", self)
        check_heads("model.vision", self.hidden_size, self.num_attention_heads, None)
        self.check_image_size()
        if not 1 <= self.num_layers_run <= self.num_layers:
            raise ConfigError(
                f"model.vision.feature_layer={self.feature_layer} is not a layer of {self.num_layers}",
                fix=f"choose -1 to {-self.num_layers}",
            )
        if min(self.image_std) <= 0:  # pixels are divided by it
            raise ConfigError(
                f"model.vision.image_std={list(self.image_std)} is not positive for every colour",
                fix="use the tower's published values",
            )

    def check_image_size(self) -> None:
        """Check that the image divides into patches.

        Raises:
            ConfigError: it does not.
        """
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.vision.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}",
                fix="choose a multiple",
            )

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """What is special about this tower."""

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
        """Features of every image, as a grid."""
        side, architecture = self.image_size // self.patch_size, self.architecture
        return Grid(side, side, int(architecture.class_token and not architecture.drop_class_token))

    @property
    def position_grid(self) -> int:
        """Patches along a side of the table of position embeddings, which is resized for images with more or fewer."""
        return self.constant_grid.rows

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens inside the tower that are no patches."""
        return int(self.architecture.class_token) + self.architecture.num_registers

    def patch_grid(self, width: int, height: int) -> Grid:
        """Return the features of an image; the same for all sizes, because every image is first made square."""
        return self.constant_grid

    @property
    def num_parameters(self) -> int:
        """Parameters of the tower."""
        return sum(self.parameter_sizes.values())

    @property
    def parameter_sizes(self) -> dict[str, int]:
        """Parameters of the embeddings, the norms around the layers and the layers that run."""
        hidden, special = self.hidden_size, self.architecture
        norm = norm_sizes(hidden, bias=special.normalization == "LayerNorm")
        sizes = prefixed("conv1", linear_sizes(3 * self.patch_size**2, hidden, bias=special.patch_bias))
        if special.class_token:
            sizes["class_token"] = hidden
        sizes["position_embeddings.weight"] = (self.position_grid**2 + int(special.class_token)) * hidden
        if special.num_registers:
            sizes["registers"] = special.num_registers * hidden
        if special.pre_norm:
            sizes.update(prefixed("ln_pre", norm))
        for layer in range(self.num_layers_run):
            sizes.update(prefixed(f"decoder.layers.{layer}", self._layer_sizes(norm)))
        if special.post_norm:
            sizes.update(prefixed("ln_post", norm))
        return sizes

    def _layer_sizes(self, norm: dict[str, int]) -> dict[str, int]:
        hidden, special = self.hidden_size, self.architecture
        head_norms = norm_sizes(hidden, bias=False) if special.qk_layernorm else {}
        scale = {"weight": hidden} if special.layer_scale is not None else {}
        qkv = linear_sizes(hidden, 3 * hidden, bias=special.add_qkv_bias)
        return {
            **prefixed("input_layernorm", norm),
            **prefixed("self_attention.linear_qkv", qkv),
            **prefixed("self_attention.q_layernorm", head_norms),
            **prefixed("self_attention.k_layernorm", head_norms),
            **prefixed("self_attention.linear_proj", linear_sizes(hidden, hidden)),
            **prefixed("self_attn_bda", scale),
            **prefixed("pre_mlp_layernorm", norm),
            **prefixed("mlp.linear_fc1", linear_sizes(hidden, self._ffn_inputs)),
            **prefixed("mlp.linear_fc2", linear_sizes(self.ffn_hidden_size, hidden)),
            **prefixed("mlp_bda", scale),
        }

    @property
    def no_weight_decay(self) -> tuple[str, ...]:
        """The embeddings, which decay would pull towards zero whatever the images."""
        return tuple(name for name in _EMBEDDINGS if name in self.parameter_sizes)

    def check_tensor_parallel(self, size: int) -> None:
        """Check that each of `size` ranks gets as many heads and as much of the MLP as the others.

        Raises:
            ConfigError: it does not.
        """
        for name in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(self, name) % size:
                raise ConfigError(
                    f"parallel.vision_tensor_parallel cannot split model.vision.{name}={getattr(self, name)} over "
                    f"tensor_model_parallel_size={size} ranks",
                    fix="turn it off, or choose a size that divides it",
                )

    @property
    def split_parameters(self) -> tuple[str, ...]:
        """Matrices, their biases where each rank has its own outputs, and the norms of queries and keys."""
        return _SPLIT

    def summed_numbers(self, patches: Grid) -> int:
        """Return the outputs of attention and MLP of all layers; the sums in norms of queries and keys are few."""
        return 2 * self.num_layers_run * (patches.num_patches + self.num_prefix_tokens) * self.hidden_size

    def operations(self, patches: Grid) -> Operations:
        """Return the operations for one image with these patches."""
        hidden, layers, tokens = self.hidden_size, self.num_layers_run, patches.num_patches + self.num_prefix_tokens
        return Operations(
            entry=2 * patches.num_patches * 3 * self.patch_size**2 * hidden,
            inner=layers * 2 * tokens * self._weights,
            attention=layers * 4 * tokens * tokens * hidden,
        )

    def activations(
        self, patches: Grid, *, learns: bool, recompute: bool, tensor_parallel_size: int = 1
    ) -> Activations:
        """Return the activations for one image, with flash attention."""
        hidden, special = self.hidden_size, self.architecture
        heads, ffn, ffn_inputs = (
            width / tensor_parallel_size for width in (hidden, self.ffn_hidden_size, self._ffn_inputs)
        )
        tokens = patches.num_patches + self.num_prefix_tokens
        # Inputs of the two norms and of the activation, query, key, value and output of attention.
        kept = 2 * hidden + 4 * heads + ffn_inputs
        if special.qk_layernorm:  # their inputs, as they are in the product of the QKV projection and copied from it
            kept += 4 * heads
        if learns:  # Inputs of the matrices and of LayerScale.
            kept += 2 * hidden + ffn + (2 * hidden if special.layer_scale is not None else 0)
        layer = Activations(kept=tokens * kept, working=tokens * (ffn_inputs + ffn + hidden))
        layers = layer.times(self.num_layers_run)
        if recompute:
            layers = layer.recomputed(self.num_layers_run, tokens * hidden)
        pixels = 3 * self.image_size**2 if learns else 0
        outside = (special.pre_norm + special.post_norm) * tokens * hidden
        return Activations(kept=layers.kept + pixels + outside, working=layers.working)

    @property
    def _ffn_inputs(self) -> int:
        """Width of the input of the activation."""
        return self.ffn_hidden_size * (2 if self.architecture.activation == "swiglu" else 1)

    @property
    def _weights(self) -> int:
        """Parameters of the matrices of a layer."""
        return 4 * self.hidden_size**2 + self.hidden_size * (self._ffn_inputs + self.ffn_hidden_size)
