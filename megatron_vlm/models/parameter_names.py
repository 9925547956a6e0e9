"""Names of parameters that are the same on every pipeline stage and with every backend, as in `config/patterns.py`."""

from collections.abc import Iterator

import torch

from megatron_vlm.models.layers.specs import NORM_KEYS
from megatron_vlm.models.vlm import VisionLanguageModel

_LAYERS = "language_model.decoder.layers."
_EMBEDDING, _OUTPUT = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"


def global_parameters(chunk: VisionLanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of a chunk under their names in the whole model."""
    language = chunk.language_model
    numbers = [layer.layer_number - 1 for layer in language.decoder.layers]
    for name, parameter in chunk.named_parameters():
        if name == _OUTPUT and language.share_embeddings_and_output_weights:
            name = _EMBEDDING  # a copy on the last stage, which learns as the embedding does
        if name.startswith(_LAYERS):
            local, inside = name.removeprefix(_LAYERS).split(".", 1)
            name = f"{_LAYERS}{numbers[int(local)]}.{_unfused(inside)}"
        yield name, parameter


def _unfused(name: str) -> str:
    """Return the name in a layer of torch's modules, whose norms are modules of their own."""
    for norm, fused in NORM_KEYS.items():
        if name.startswith(fused):
            return norm + name.removeprefix(fused)
    return name
