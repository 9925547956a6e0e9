"""LoRA: to the product of a matrix W, the product of two narrow ones is added: y = W x + alpha / rank * B A drop(x).

Source: Hu et al., arXiv:2106.09685; VILA, arXiv:2312.07533, table 9, with the defaults of its published code.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.checks import check_at_most, check_not_negative, check_positive
from megatron_vlm.config.comparison import FREE
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.operations import Operations

if TYPE_CHECKING:
    from megatron_vlm.config.model import ModelConfig

Target = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
TARGETS: tuple[Target, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The matrices of a decoder layer, in the order of `LanguageConfig.layer_matrices`."""
COLUMN_PARALLEL: tuple[Target, ...] = ("linear_qkv", "linear_fc1")
"""Tensor parallelism splits their outputs; it splits the inputs of the others."""
_SECTION = "model.adapter"
_MAX_RANK = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which matrices of the decoder are adapted, and by what."""

    type: Literal["lora"] = "lora"
    rank: int = 64
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """What B A x is multiplied by, times the rank."""
    dropout: Annotated[float, FREE] = 0.05
    """Share of the inputs of A that a training step sets to zero."""
    targets: tuple[Target, ...] = TARGETS
    """Matrices of every decoder layer."""
    ranks: dict[str, int] = field(default_factory=dict, hash=False)
    """Ranks by target, of those whose own is not `rank`; the scale is alpha / rank for all. An import sets them."""

    def __post_init__(self) -> None:
        check_positive(_SECTION, self, "rank", "alpha")
        check_at_most(_SECTION, self, _MAX_RANK, "rank")
        check_not_negative(_SECTION, self, "dropout")
        if self.dropout >= 1:
            raise ConfigError(f"{_SECTION}.dropout={self.dropout} leaves nothing", fix="use a share below 1")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"{_SECTION}.targets={list(self.targets)} does not name each target once",
                fix=f"choose from {', '.join(TARGETS)}",
            )
        for target, rank in self.ranks.items():
            if target not in self.targets or not 0 < rank <= _MAX_RANK:
                raise ConfigError(
                    f"{_SECTION}.ranks.{target}={rank} is not a rank from 1 to {_MAX_RANK} of one of the targets",
                    fix="remove it, or name a target",
                )

    @property
    def parts(self) -> tuple[str, ...]:
        """Only the decoder."""
        return ("language_model",)

    @property
    def scale(self) -> float:
        """Factor of B A x."""
        return self.alpha / self.rank

    def rank_of(self, target: Target) -> int:
        """Return the rank of one target."""
        return self.ranks.get(target, self.rank)

    def _sizes(self, model: "ModelConfig", tensor_parallel_size: int = 1) -> list[tuple[Target, int, int, int]]:
        """Return target, rank, and the inputs and outputs of its matrix on one tensor-parallel rank."""
        matrices = zip(TARGETS, model.language.layer_matrices(tensor_parallel_size), strict=True)
        return [(target, self.rank_of(target), *sizes) for target, sizes in matrices if target in self.targets]

    def parameter_names(self, model: "ModelConfig", part: str) -> tuple[str, ...]:
        """Return the names of all A and B inside the decoder."""
        layers = range(model.language.num_layers)
        return tuple(
            f"decoder.layers.{layer}.lora.{target}.{name}"
            for layer in layers
            for target in TARGETS
            if target in self.targets
            for name in "ab"
        )

    def num_parameters(self, model: "ModelConfig", part: str, *, num_layers: int, tensor_parallel_size: int) -> int:
        """Return the number of parameters; what a matrix and its A or B do not share is whole on every rank."""
        return num_layers * sum(
            rank * (inputs + outputs) for _, rank, inputs, outputs in self._sizes(model, tensor_parallel_size)
        )

    def operations(self, model: "ModelConfig", part: str, num_positions: float, num_image_tokens: float) -> Operations:
        """Return the operations of A and B in all layers."""
        layer = sum(rank * (inputs + outputs) for _, rank, inputs, outputs in self._sizes(model))
        return Operations(inner=2.0 * num_positions * model.language.num_layers * layer)

    def activations(
        self,
        model: "ModelConfig",
        part: str,
        num_positions: float,
        num_image_tokens: float,
        *,
        num_layers: int,
        tensor_parallel_size: int,
    ) -> Activations:
        """Return what A and B keep: their inputs, and the mask of dropout, a byte a number."""
        mask = 0.5 if self.dropout else 0.0
        kept = sum(inputs * (1 + mask) + rank for _, rank, inputs, _ in self._sizes(model, tensor_parallel_size))
        return Activations(kept=num_layers * num_positions * kept)
