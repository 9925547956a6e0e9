"""What the model is: sizes of its three parts and the arithmetic that data and models share."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vlm.config.checks import check_positive
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.grid import Grid

IGNORE_INDEX = -100
"""Label of a position without a loss."""

_VOCAB_SIZE_DIVISOR = 64
# Ids that follow the tokenizer's own: the image placeholder, then padding (the order of llava-1.5-hf).
_NUM_ADDED_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """A Llama-2 decoder."""

    vocab_size: int
    """Pieces of the tokenizer, without the added tokens."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    """Key/value heads; None: one per attention head."""
    kv_channels: int | None = None
    """Size of one head; None: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 4096
    """Longest sample that the model is meant for [tokens]; recorded at conversion."""
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        check_positive("model.language", self, *sizes, "num_query_groups", "kv_channels", "max_position_embeddings")
        _check_heads("model.language", self.hidden_size, self.num_attention_heads, self.kv_channels)
        if self.num_attention_heads % self.query_groups:
            raise ConfigError(
                f"model.language.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.query_groups}",
                fix="choose a divisor",
            )

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_channels(self) -> int:
        """Size of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def image_token_id(self) -> int:
        """Placeholder id that stands at every image position."""
        return self.vocab_size

    @property
    def pad_token_id(self) -> int:
        """Id of positions that hold nothing."""
        return self.vocab_size + 1

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the same for every parallel layout, so that losses are too."""
        wanted = self.vocab_size + _NUM_ADDED_TOKENS
        return -(-wanted // _VOCAB_SIZE_DIVISOR) * _VOCAB_SIZE_DIVISOR


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """What the vision encoder sees and how many tokens it hands to the language model."""

    image_size: int = 336
    """Side of the square image that the tower is fed [pixels]."""
    patch_size: int = 14
    """Side of a square patch [pixels]."""
    num_layers: int
    """Layers of the encoder as published; `feature_layer` says how many of them run."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    feature_layer: int = -2
    """Which hidden state is handed on, counted as Hugging Face does: -1 is the last layer's output."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    class_token: bool = True
    """Whether the encoder has a class token; its feature is never handed on."""
    pre_norm: bool = True
    """Whether a norm stands between the embeddings and the first layer (CLIP)."""
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        check_positive("model.vision", self, *sizes)
        _check_heads("model.vision", self.hidden_size, self.num_attention_heads, None)
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
        """Layers that the chosen hidden state needs."""
        return self.num_layers + 1 + self.feature_layer

    @property
    def constant_grid(self) -> Grid | None:
        """Patches of every image; None for a tower whose patches depend on the size of the image."""
        side = self.image_size // self.patch_size
        return Grid(side, side)

    def patch_grid(self, width: int, height: int) -> Grid:
        """Return the patches of an image of this size, in pixels as stored; here every image is made square first."""
        side = self.image_size // self.patch_size
        return Grid(side, side)

    @property
    def num_patches(self) -> int:
        """Patches of the square image that the tower is built for."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionConfig:
    """How image features become language-model embeddings."""

    type: Literal["linear", "mlp2x_gelu"] = "linear"
    """The paper uses one linear layer; the released weights and LLaVA-1.5 an MLP with exact GELU."""

    def token_grid(self, patches: Grid) -> Grid:
        """Return the image tokens of a grid of patches: one each."""
        return patches


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The three parts, named as in checkpoints."""

    language: LanguageConfig
    vision: VisionConfig
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    backend: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Layer implementation; auto takes transformer-engine where it imports and a GPU is there."""

    def num_image_tokens(self, width: int, height: int) -> int:
        """Return the placeholders of an image in the language model; data and models both ask here.

        Args:
            width: of the image as it is stored [pixels].
            height: likewise.
        """
        return self.projection.token_grid(self.vision.patch_grid(width, height)).size

    @property
    def constant_image_tokens(self) -> int | None:
        """Placeholders of every image; None where their number depends on the size of the image."""
        grid = self.vision.constant_grid
        return None if grid is None else self.projection.token_grid(grid).size

    def fixed_image_tokens(self, what_needs_it: str) -> int:
        """Return `constant_image_tokens` for code that handles no other case.

        Raises:
            ConfigError: images have different numbers of tokens; names what needs the constant.
        """
        tokens = self.constant_image_tokens
        if tokens is None:
            raise ConfigError(
                f"{what_needs_it} needs the same number of tokens for every image",
                where="model.vision",
                fix="use a tower with a fixed input size",
            )
        return tokens


def _check_heads(section: str, hidden_size: int, num_attention_heads: int, kv_channels: int | None) -> None:
    if kv_channels is None and hidden_size % num_attention_heads:
        raise ConfigError(
            f"{section}.hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}",
            fix="choose a multiple, or set kv_channels",
        )
