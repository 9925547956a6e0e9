"""What 4 bits cost: perplexity of a language model after rounding to nearest, and after AWQ's searches.

    python tools/benchmarks/quantize.py runs/smolvlm/weights/smollm2 --json quantize.json

The folder is a LlamaForCausalLM; `PYTHONPATH=examples python -m smolvlm.weights runs/smolvlm/weights`
makes that of SmolLM2-135M. The text is Python's own documentation of its topics: the first, third ... topic calibrate,
2,048 tokens of them; of the others transformers scores 4,096, with dequantised weights. What is required: AWQ loses at
most half of what rounding to nearest loses, and its scales alone lose less than rounding.
"""

import argparse
import math
import pydoc_data.topics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from report import Row, describe_versions, parse_arguments, report
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_vlm.convert.families import llama
from megatron_vlm.convert.quantize.decoder_layer import DecoderLayer
from megatron_vlm.convert.quantize.groups import Grid
from megatron_vlm.convert.quantize.search import Recipe, quantise_layer
from megatron_vlm.data.text.tokenizer import load_tokenizer

_LENGTH, _CALIBRATING, _SCORED = 512, 4, 8
_RECIPES = {
    "rounding to nearest": {"with_scales": False, "with_bounds": False},
    "scales": {"with_bounds": False},
    "scales and bounds": {},
}


def read_sequences(folder: Path, offset: int, count: int) -> Tensor:
    """Return int64[count, 512] of every second topic, from the first or the second one."""
    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)][offset::2]
    ids = load_tokenizer(folder).encode("\n".join(texts))
    return torch.tensor(ids[: count * _LENGTH]).view(count, _LENGTH)


def perplexity(model: PreTrainedModel, sequences: Tensor) -> float:
    """Return that of all tokens but the first of each sequence."""
    losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in sequences]
    return math.exp(torch.stack(losses).mean().item())


def quantised(model: PreTrainedModel, sequences: Tensor, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of all layers, dequantised, by their names in the model."""
    language = llama.config_from_hf(model.config.to_dict(), where="config.json")
    weights, layer = model.state_dict(), DecoderLayer(language)
    hidden = weights["model.embed_tokens.weight"][sequences].clone()
    for number in range(language.num_layers):
        prefix = f"model.layers.{number}."
        names = {name.split(".")[-2]: name for name in weights if name.startswith(prefix)}
        read = {module: weights[name] for module, name in names.items()}
        norms, matrices = quantise_layer(layer, read, hidden, recipe, torch.float16)
        for module, tensor in norms.items():
            yield names[module], tensor
        for module, matrix in matrices.items():
            yield names[module], matrix.dequantise()


def measure(folder: Path, group_size: int, grid: Grid) -> tuple[float, dict[str, float]]:
    """Return the perplexity of the model, and that after each way of quantisation."""
    calibrating, scored = read_sequences(folder, 0, _CALIBRATING), read_sequences(folder, 1, _SCORED)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    changed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for name, options in _RECIPES.items():
        recipe = Recipe(grid=grid, group_size=group_size, **options)
        changed.load_state_dict(dict(quantised(exact, calibrating, recipe)), strict=False)
        found[name] = perplexity(changed, scored)
    return perplexity(exact, scored), found


def make_rows(exact: float, found: dict[str, float]) -> list[Row]:
    """Return what is lost, relative to what rounding to nearest loses."""
    nearest = found["rounding to nearest"] - exact
    if not nearest > 0:
        raise ValueError(
            f"rounding to nearest loses nothing on this text ({nearest:+.3f}), so the ways cannot be compared"
        )
    bounds = {"scales": 1.0, "scales and bounds": 0.5}
    return [
        Row(
            work=f"loss of perplexity with {name}",
            unit="of that with rounding to nearest",
            ours=max(0.0, (found[name] - exact) / nearest),
            required=required,
            judged="at most",
        )
        for name, required in bounds.items()
    ]


def main() -> int:
    """Run the benchmark; returns the exit code."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", type=Path, help="folder of a LlamaForCausalLM")
        parser.add_argument("--group-size", type=int, default=64, help="default: %(default)s, which divides 576")
        parser.add_argument("--bits", type=int, choices=(3, 4), default=4, help="default: %(default)s")
        parser.add_argument("--symmetric", action="store_true", help="levels as in compressed-tensors")

    arguments = parse_arguments(__doc__, add)
    with torch.no_grad():
        grid = Grid(is_symmetric=arguments.symmetric, bits=arguments.bits)
        exact, found = measure(arguments.folder, arguments.group_size, grid)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in {"not quantised": exact, **found}.items())
    notes = [f"perplexity: {figures}", describe_versions("torch", "transformers")]
    return report(make_rows(exact, found), arguments.json, notes)


if __name__ == "__main__":
    sys.exit(main())
