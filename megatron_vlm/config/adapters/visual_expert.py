"""A visual expert: every matrix of the decoder twice, the second for image positions; the original stays for text.

Source: CogVLM, arXiv:2311.03079, section 2.1; VILA, arXiv:2312.07533, table 8.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_vlm.config.activations import Activations
from megatron_vlm.config.operations import Operations

if TYPE_CHECKING:
    from megatron_vlm.config.model import ModelConfig

WEIGHTS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The expert's matrices of a layer, in the order of `LanguageConfig.layer_matrices`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A visual expert has no settings. Freeze the decoder with it, so that text is answered as before."""

    type: Literal["visual_expert"] = "visual_expert"

    @property
    def parts(self) -> tuple[str, ...]:
        """Only the decoder."""
        return ("language_model",)

    def parameter_names(self, model: "ModelConfig", part: str) -> tuple[str, ...]:
        """Return the names of the four matrices of every layer."""
        layers = range(model.language.num_layers)
        return tuple(f"decoder.layers.{layer}.expert.{name}" for layer in layers for name in WEIGHTS)

    def num_parameters(self, model: "ModelConfig", part: str, *, num_layers: int, tensor_parallel_size: int) -> int:
        """Return the number of parameters; each matrix is split like the original."""
        matrices = model.language.layer_matrices(tensor_parallel_size)
        return num_layers * sum(inputs * outputs for inputs, outputs in matrices)

    def operations(self, model: "ModelConfig", part: str, num_positions: float, num_image_tokens: float) -> Operations:
        """Return the gradients of the weights; the products at image positions take the place of the decoder's."""
        language = model.language
        return Operations(gradient=2.0 * num_image_tokens * language.num_layers * language.layer_weights)

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
        """Return the inputs of the matrices at image positions, which sequence parallelism does not split."""
        inputs = sum(inputs for inputs, _ in model.language.layer_matrices(tensor_parallel_size))
        return Activations(kept=num_layers * num_image_tokens * inputs)
