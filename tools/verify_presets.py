"""Compare every preset at its true size with transformers' own class, without values, and write docs/verified.md.

    python tools/verify_presets.py [--other PYTHON] [--output FILE]

`--other` is the interpreter of an environment with another version of transformers, whose figures get a column of their
own; `bash tests/convert/setup_transformers5.sh` makes one. Takes about a minute.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_vlm.config import ModelConfig, load_section
from megatron_vlm.config.presets import preset_names
from megatron_vlm.convert.families import llava
from megatron_vlm.convert.family import Family, find_family, find_tower_family
from megatron_vlm.convert.folder import rename
from megatron_vlm.convert.rules import Vocabulary

PRESETS = "megatron_vlm.config.presets"
OUTPUT = Path(__file__).parents[1] / "docs" / "verified.md"
COMMAND = "python tools/verify_presets.py --other .venv-transformers5/bin/python"
Shapes = dict[str, tuple[int, ...]]
HEAD = f"""# What is verified of each preset
Written by `{COMMAND}`, with torch TORCH on a CPU.

Each preset was built at its true size as transformers' own class, without values, from the config.json that an export
would have. *Equal* says that the class has exactly the tensors of our conversion table, by name and shape (a few with a
fixed value, such as the identity in place of an unused norm, among them). Parameters are those that our model has:
without unused norms and heads, mask tokens, and the rows of image and padding.
"""
_ROUND_TRIPS = "`pytest -m slow tests/convert/test_round_trips.py`"
_VALUES = (
    ("what", "bar", "command"),
    ("---", "---", "---"),
    (
        "decoders with the features of the language presets, saved by transformers 4 and 5, in and out",
        "every bit; KL <= 1e-7 and the same top-1 over 1,200 positions in float32",
        _ROUND_TRIPS,
    ),
    ("a LLaVA of both versions, in and out, with images", "the same", _ROUND_TRIPS),
    ("CLIP, SigLIP, InternViT, DINOv2 and, by transformers 5, RADIO, in and out", "every bit", _ROUND_TRIPS),
    (
        "real weights: SmolLM2-135M in at TP and PP 1 and 3 and out as `vila`, with a DINOv2",
        "every bit; KL <= 1e-6 over 1,200 positions of English in float32",
        "`pytest -m slow tests/convert/test_real_weights.py`",
    ),
    ("features and gradients of the towers against transformers", "1e-5", "`pytest tests/models/towers`"),
    ("logits of an export in transformers 4", "2e-5", "`pytest tests/convert/test_to_hf.py`"),
)
TAIL = """
## Values
True sizes have no values here. Small copies do, each held by a test:

VALUES

## What is not verified
- Published weights: no test reads a published Llama, Vicuna, Sheared-LLaMA, Yi, CLIP, SigLIP, InternViT, RADIO or VILA
  folder. The real weights of SmolLM2-135M are 4-bit values, dequantised; the DINOv2 ViT-S/14 may be fine-tuned.
- OpenGVLab's InternVisionModel and NVIDIA's RADIO code are not installed: their layouts are tested from their published
  names and shapes.
- A GPU: every figure is of a CPU.
"""


def presets() -> Iterator[tuple[str, str, Any, Family]]:
    """Yield kind, name, settings and family of every preset; a tower is taken as a whole, up to its last layer."""
    llama = find_family("llama", "language", "")
    for name in preset_names(f"{PRESETS}.language"):
        yield "language", name, _load({"preset": "vila-7b", "language": {"preset": name}}).language, llama
    for name in preset_names(f"{PRESETS}.models"):
        yield "models", name, _load({"preset": name}), llava
    for name in preset_names(f"{PRESETS}.vision"):
        vision: Any = _load({"preset": "vila-7b", "vision": {"preset": name}}).vision
        yield "vision", name, dataclasses.replace(vision, feature_layer=-1), find_tower_family(vision.type)


def _load(model: dict[str, Any]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.yaml"
        path.write_text(yaml.safe_dump({"model": model}))
        return load_section(ModelConfig, path, "model")


def table_shapes(settings: Any, family: Family) -> tuple[Shapes, int]:
    """Return what our table and the constants say, by their name, and the parameters of the table.

    The rows of image and padding, which we add, are no parameters of the preset.
    """
    shapes: Shapes = {}
    added = 0
    for rule in family.rules(settings):
        for layer in rule.layers:
            shapes.update(zip(rule.names_of(layer), rule.their_shapes(), strict=True))
        if isinstance(rule.transform, Vocabulary):
            added += (rule.transform.num_their_rows - rule.transform.vocab_size) * rule.shape[1]
    constants = {name: tuple(tensor.shape) for name, tensor in family.constants(settings).items()}
    return {**shapes, **constants}, sum(map(math.prod, shapes.values())) - added


def their_shapes(settings: Any, family: Family) -> Shapes | None:
    """Return what transformers' class has, by the names of our table; None if this version has no such class."""
    import transformers

    values = json.loads(json.dumps(family.config_to_hf(settings)))
    kind = getattr(transformers, values["architectures"][0], None)
    if kind is None:
        return None
    with torch.device("meta"):
        model = kind(kind.config_class(**values))
    names = family.renames(values)
    return {rename(name, names): tuple(value.shape) for name, value in _as_saved(model).items()}


def _as_saved(model: Any) -> Mapping[str, torch.Tensor]:
    """Return the tensors by their names in files, which in transformers 5 are not always those in memory."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return model.state_dict()
    return revert_weight_conversion(model, model.state_dict())


def compare(settings: Any, family: Family) -> str:
    """Return what the comparison of one preset found, as a cell of the table."""
    if isinstance(settings, ModelConfig) and llava.reason_against(settings):
        return "not in this format"
    ours, _ = table_shapes(settings, family)
    theirs = their_shapes(settings, family)
    if theirs is None:
        return "no such class"
    tied = getattr(getattr(settings, "language", settings), "share_embeddings_and_output_weights", False)
    if tied:
        theirs = {name: shape for name, shape in theirs.items() if not name.endswith("lm_head.weight")}
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return f"equal, {len(ours)} tensors" if not wrong else f"**{len(wrong)} tensors differ, first {wrong[0]}**"


def facts(names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what this version of transformers says about the presets.

    Args:
        names: of the presets; None: all.
    """
    import transformers

    found = {
        name: compare(settings, family) for _, name, settings, family in presets() if names is None or name in names
    }
    return {"version": transformers.__version__, "presets": found}


def size(settings: Any, family: Family) -> str:
    """Return the parameters of a part, or the parts of a whole model, as a cell of the table."""
    if isinstance(settings, ModelConfig):
        return f"{settings.vision.type}, {settings.projection.type}"
    return f"{table_shapes(settings, family)[1]:,}"


def torch_version(page: str) -> str:
    """Return the version of torch that a page was written with."""
    found = re.search(r"with torch (\S+) on a CPU", page)
    return found[1] if found else ""


def render(columns: Sequence[Mapping[str, Any]], *, torch_version: str) -> str:
    """Return the page.

    Args:
        columns: `facts` of each version of transformers.
        torch_version: of the run.
    """
    versions = [f"transformers {column['version']}" for column in columns]
    lines = [HEAD.replace("TORCH", torch_version)]
    reasons: dict[str, list[str]] = {}
    titles = {
        "language": "Language models",
        "vision": "Towers",
        "models": "Whole models, as LlavaForConditionalGeneration",
    }
    for kind, title in titles.items():
        second = "tower, projection" if kind == "models" else "parameters"
        lines += [f"## {title}", f"| preset | {second} | {' | '.join(versions)} |", "|---" * (2 + len(versions)) + "|"]
        for own, name, settings, family in presets():
            if own != kind:
                continue
            cells = [column["presets"][name] for column in columns]
            lines.append(f"| {name} | {size(settings, family)} | {' | '.join(cells)} |")
            if isinstance(settings, ModelConfig) and (reason := llava.reason_against(settings)):
                reasons.setdefault(reason, []).append(name)
        lines.append("")
    lines += [f"- {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    values = "\n".join(f"| {' | '.join(row)} |" for row in _VALUES)
    return "\n".join(lines) + "\n" + TAIL.replace("VALUES", values)


def _start_other(python: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(OUTPUT.parents[1])}
    command = [str(python), __file__, "--facts"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def main() -> None:
    """Write the page, or print the facts of this version as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, metavar="PYTHON", help="interpreter with another version of transformers")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: docs/verified.md")
    parser.add_argument("--facts", action="store_true", help="print what this version says instead")
    args = parser.parse_args()
    if args.facts:
        print(json.dumps(facts()))
        return
    other = _start_other(args.other) if args.other else None
    columns = [facts()]
    if other is not None:
        text, _ = other.communicate()
        if other.returncode:
            sys.exit(f"{args.other} failed; see its message above")
        columns.append(json.loads(text.splitlines()[-1]))
    args.output.write_text(render(columns, torch_version=torch.__version__.split("+")[0]))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
