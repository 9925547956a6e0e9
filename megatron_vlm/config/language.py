"""The Llama-2 decoder: its sizes, its token ids, and what it costs: parameters, operations and activations."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.checks import check_heads, check_not_negative, check_positive, check_sizes
from megatron_vlm.config.comparison import FREE, IN_NEW_STAGE, Compared
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.operations import Operations
from megatron_vlm.config.parameter_sizes import norm_sizes, prefixed

LAYER_NAMES = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
"""Parameters of one layer in the order of the forward pass."""
MATRIX_NAMES = tuple(name for name in LAYER_NAMES if ".linear_" in name)
"""Those of `LanguageConfig.layer_matrices`."""
_VOCAB_SIZE_DIVISOR = 64
# Ids after those of the tokenizer: the image placeholder, then padding (the order of llava-1.5-hf).
_NUM_ADDED_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSplit:
    """How the activations of a layer are split over tensor-parallel ranks."""

    size: int = 1
    """Ranks; they split what is inside attention and MLP."""
    sequence_parallel: bool = False
    """Whether they also split what is between them."""

    @property
    def sequence(self) -> int:
        """Ranks that split what is between attention and MLP."""
        return self.size if self.sequence_parallel else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """A Llama-2 decoder."""

    PRESETS: ClassVar[str] = "megatron_vlm.config.presets.language"

    vocab_size: int
    """Entries of the tokenizer; image and padding come after them."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: Annotated[int | None, Compared(stands_for="query_groups")] = None
    """Key/value heads; None for one per attention head."""
    kv_channels: Annotated[int | None, Compared(stands_for="head_channels")] = None
    """Size of one head; None for hidden_size / num_attention_heads."""
    max_position_embeddings: Annotated[int, FREE] = 4096
    """Longest sample that the model supports [tokens]; set by conversion."""
    rotary_base: Annotated[float, IN_NEW_STAGE] = 10000.0
    layernorm_epsilon: float = 1e-5
    share_embeddings_and_output_weights: bool = False
    init_method_std: Annotated[float, FREE] = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        check_positive("model.language", self, *sizes, "num_query_groups", "kv_channels", "max_position_embeddings")
        check_positive("model.language", self, "rotary_base", "layernorm_epsilon")
        check_not_negative("model.language", self, "init_method_std")
        check_sizes("model.language", self)
        check_heads("model.language", self.hidden_size, self.num_attention_heads, self.kv_channels)
        if self.num_attention_heads % self.query_groups:
            raise ConfigError(
                f"model.language.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.query_groups}",
                fix="choose a divisor",
            )
        if self.head_channels % 2:  # rotary embeddings turn pairs of channels
            raise ConfigError(
                f"model.language: the size of a head is {self.head_channels}, an odd number",
                fix="set an even kv_channels, or another num_attention_heads",
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
        """Id of the placeholder at every image position."""
        return self.vocab_size

    @property
    def pad_token_id(self) -> int:
        """Id of padding."""
        return self.vocab_size + 1

    @property
    def num_token_ids(self) -> int:
        """Ids of the tokenizer, of images and of padding; only those of the tokenizer are predicted."""
        return self.vocab_size + _NUM_ADDED_TOKENS

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; independent of the parallel layout. Rows from `num_token_ids` on are zero.

        A multiple of the heads, too: a tensor parallelism that splits these splits the rows.
        """
        divisor = math.lcm(_VOCAB_SIZE_DIVISOR, self.num_attention_heads)
        return -(-self.num_token_ids // divisor) * divisor

    @property
    def attention_sizes(self) -> tuple[int, int]:
        """Total width of the queries of a layer, and of its keys (or values)."""
        return self.num_attention_heads * self.head_channels, self.query_groups * self.head_channels

    def layer_matrices(self, tensor_parallel_size: int = 1) -> tuple[tuple[int, int], ...]:
        """Return inputs and outputs of the matrices of one layer on one rank, in the order of the forward pass.

        Tensor parallelism splits the outputs of the first and third matrix, and the inputs of the other two.
        """
        hidden, ffn, tp = self.hidden_size, self.ffn_hidden_size, tensor_parallel_size
        query, key_value = self.attention_sizes
        return (
            (hidden, (query + 2 * key_value) // tp),
            (query // tp, hidden),
            (hidden, 2 * ffn // tp),
            (ffn // tp, hidden),
        )

    @property
    def layer_weights(self) -> int:
        """Parameters in the matrices of one layer; tensor parallelism splits them."""
        return sum(inputs * outputs for inputs, outputs in self.layer_matrices())

    @property
    def parameter_sizes(self) -> dict[str, int]:
        """Size of every parameter by its name in a decoder on one rank, in the order of the forward pass."""
        sizes = {"embedding.word_embeddings.weight": self.embedding_weights}
        matrices = dict(zip(MATRIX_NAMES, (inputs * outputs for inputs, outputs in self.layer_matrices()), strict=True))
        norm = norm_sizes(self.hidden_size, bias=False)
        for layer in range(self.num_layers):
            inside = {**prefixed("input_layernorm", norm), **prefixed("pre_mlp_layernorm", norm), **matrices}
            sizes.update(prefixed(f"decoder.layers.{layer}", {name: inside[name] for name in LAYER_NAMES}))
        sizes.update(prefixed("decoder.final_layernorm", norm))
        if not self.share_embeddings_and_output_weights:
            sizes["output_layer.weight"] = self.embedding_weights
        return sizes

    @property
    def layer_norms(self) -> int:
        """Parameters in the norms of one layer; every tensor-parallel rank has all of them."""
        return 2 * self.hidden_size

    @property
    def embedding_weights(self) -> int:
        """Parameters of the embedding; the output layer has the same number, or shares them."""
        return self.padded_vocab_size * self.hidden_size

    def layer_operations(self, num_tokens: float, attention_pairs: float) -> Operations:
        """Return the operations of one layer.

        Args:
            num_tokens: positions without padding.
            attention_pairs: query-key pairs that causal attention inside the samples computes.
        """
        query, _ = self.attention_sizes
        return Operations(inner=2.0 * num_tokens * self.layer_weights, attention=4.0 * attention_pairs * query)

    def output_operations(self, num_labels: float) -> Operations:
        """Return the operations of the output layer for the positions with a loss."""
        return Operations(inner=2.0 * num_labels * self.embedding_weights)

    def layer_activations(
        self, num_tokens: int, split: TensorSplit, *, learning: tuple[bool, ...], rotates_in_place: bool
    ) -> Activations:
        """Return the activations of one layer, with flash attention and a fused SwiGLU.

        Args:
            num_tokens: positions of the micro-batch, with padding.
            split: over the tensor-parallel ranks.
            learning: which of `MATRIX_NAMES` learn: these need their inputs for gradients of their own.
            rotates_in_place: whether rotated queries and keys overwrite the product of the QKV projection. Otherwise
                that product stays as long as the values, which are a part of it.

        Source: Korthikanti et al., arXiv:2205.05198, section 4; here with a gated MLP and rotary embeddings.
        """
        (query, key_value), ffn = self.attention_sizes, self.ffn_hidden_size
        # Each matrix keeps its input; each norm, attention and SwiGLU theirs. Attention also keeps its output, which
        # is the input of the next matrix.
        qkv, _, fc1, fc2 = learning
        whole = self.hidden_size * (2 + qkv + fc1)
        attention = 2 * query + 2 * key_value
        if not rotates_in_place:
            attention += query + key_value
        elif 1 < self.query_groups < self.num_attention_heads:
            attention += query  # queries of several groups are first copied out of the product
        mlp = ffn * (2 + fc2)
        kept = whole / split.sequence + (attention + mlp) / split.size
        # The gradients of input and output of SwiGLU, the latter's own input, and the gradient of the layer's output.
        working = 4 * ffn / split.size + self.hidden_size
        return Activations(kept=num_tokens * kept, working=num_tokens * working)

    def output_activations(self, num_tokens: int, num_labels: float, split: TensorSplit) -> Activations:
        """Return the activations of final norm, output layer and loss.

        The hidden states before the norm, those at the positions with a loss, the logits there, and their exponentials
        in FP32.
        """
        logits = num_labels * self.padded_vocab_size / split.size
        kept = (num_tokens / split.sequence + num_labels) * self.hidden_size
        return Activations(kept=kept, working=3 * logits)
