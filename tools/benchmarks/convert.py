"""Converting a Llama-2-7B and a CLIP-L of random weights from and to Hugging Face, in fresh processes.

    python tools/benchmarks/convert.py --folder /big/disk --json convert.json

Needs 60 GB of disk and writes 85 GB in all; everything is deleted again. Peer: copying the same bytes in blocks,
flushing them to the disk, and reading the copy back for its sha256, which a conversion does, too. It takes its turn
before, between and after the conversions; each is compared with the mean of the copies next to it, by the clock and by
CPU seconds. The page cache is asked to forget the input before each turn. Memory is the largest resident set, including
the pages of mapped files. `--layers` makes a smaller Llama of the same widths, `--tiny` a model for the test of this
script.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Row, describe_versions, parse_arguments, report

_BLOCK_BYTES = 1 << 22
_GIB = 2**30
_MAX_GIB, _MAX_TIME = 6.0, 1.5
_PEER = "copy and hash"
_WHOLE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 500}
_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}


@dataclass(frozen=True, slots=True)
class Taken:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    gibibytes: float
    """Largest resident set."""


def write_llama(folder: Path, settings: dict[str, Any]) -> None:
    """Write a Llama in bfloat16 with a tokenizer."""
    hidden, ffn, vocabulary = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden), "model.norm": (hidden,)}
    for layer in range(settings["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{name}mlp.{part}_proj": (ffn, hidden) for part in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj": (hidden, ffn)}
        shapes |= {f"{name}{part}_layernorm": (hidden,) for part in ("input", "post_attention")}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, **settings}
    _write_folder(folder, config, {f"{name}.weight": shape for name, shape in shapes.items()})
    _write_tokenizer(folder / "tokenizer.model", vocabulary)


def write_clip(folder: Path, settings: dict[str, Any]) -> None:
    """Write a CLIP tower for images of 336 pixels in bfloat16."""
    hidden, ffn = settings["hidden_size"], settings["intermediate_size"]
    root = "vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}embeddings.class_embedding": (hidden,),
        f"{root}embeddings.patch_embedding.weight": (hidden, 3, 14, 14),
        f"{root}embeddings.position_embedding.weight": (577, hidden),
    }
    for part in (f"{root}pre_layrnorm", f"{root}post_layernorm"):
        shapes |= {f"{part}.weight": (hidden,), f"{part}.bias": (hidden,)}
    for layer in range(settings["num_hidden_layers"]):
        name = f"{root}encoder.layers.{layer}."
        sizes = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        for part, size in {**sizes, "mlp.fc1": (ffn, hidden), "mlp.fc2": (hidden, ffn)}.items():
            shapes |= {f"{name}{part}.weight": size, f"{name}{part}.bias": size[:1]}
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{name}{part}.weight": (hidden,), f"{name}{part}.bias": (hidden,)}
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **settings}
    _write_folder(folder, config | {"image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu"}, shapes)


def _write_folder(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    from megatron_vlm.convert.weights_writer import Announced, WeightsWriter

    # Values of which no two tensors have the same, and no generator that would take longer than the disk.
    pool = torch.randn((1 << 22) + 1, generator=torch.Generator().manual_seed(len(shapes))).mul_(0.02).bfloat16()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, shape) in enumerate(shapes.items()):
            size = torch.Size(shape).numel()
            yield name, pool.roll(977 * number).repeat(-(-size // len(pool)))[:size].view(shape)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    writer = WeightsWriter(
        folder, [Announced(name, shape, torch.bfloat16) for name, shape in shapes.items()], 5 * 10**9
    )
    writer.write(tensors())


def _write_tokenizer(path: Path, num_pieces: int) -> None:
    """Train a small tokenizer of Llama's kind and append pieces that no text contains."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a picture of a cat and a dog"]),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=280,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    found = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    with path.open("ab") as stream:
        for number in range(found, num_pieces):  # ModelProto.pieces: a text and a score; messages merge
            text = f"\u25c7{number}".encode()
            piece = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", -float(number))
            stream.write(bytes([0x0A, len(piece)]) + piece)


def copy_and_hash(source: Path, target: Path) -> None:
    """Copy the files of a folder in this process, flush each to the disk, and hash what is read back."""
    for file in _files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reading, copy.open("wb") as writing:
            while block := reading.read(_BLOCK_BYTES):
                writing.write(block)
            writing.flush()
            os.fsync(writing.fileno())
        digest = hashlib.sha256()
        with copy.open("rb") as reading:
            while block := reading.read(_BLOCK_BYTES):
                digest.update(block)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def _forget(folder: Path) -> None:
    """Ask the system to drop the files of a folder from its cache."""
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _run(*command: object) -> Taken:
    """Run a command and wait for it.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(map(str, command))}")
    seconds = time.perf_counter() - started
    return Taken(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / _GIB)


def _convert(*arguments: object) -> Taken:
    return _run(sys.executable, "-m", "megatron_vlm", "convert", *arguments)


def _copy(source: Path, folder: Path) -> Taken:
    """Let the peer copy a folder."""
    _forget(source)
    taken = _run(sys.executable, __file__, "--in-this-process", source, folder / "copy")
    shutil.rmtree(folder / "copy")
    return taken


def measure(folder: Path, llama: dict[str, Any], tower: dict[str, Any]) -> list[Row]:
    """Write the models, convert them in and out, and compare."""
    for part, settings in (("llama", llama), ("clip", tower)):
        _run(sys.executable, __file__, "--write", part, json.dumps(settings), folder / "source" / part)
    source, run, exported = folder / "source", folder / "run", folder / "exported"
    size = _size(source) / 1e6
    copies = [_copy(source, folder)]
    _forget(source)
    parts = ("--language", source / "llama", "--vision", source / "clip")
    found = {"from-hf": _convert("from-hf", *parts, "--projection", "mlp2x_gelu", "--output", run)}
    shutil.rmtree(source)
    copies.append(_copy(run, folder))
    _forget(run)
    found["to-hf"] = _convert("to-hf", run, "--dtype", "bfloat16", "--output", exported)
    copies.append(_copy(run, folder))
    rows = []
    for number, (verb, taken) in enumerate(found.items()):
        peers, work = copies[number : number + 2], f"{verb}, {size:.0f} MB"
        rows.append(_speed(work, "MB a second", size / taken.seconds, [size / peer.seconds for peer in peers]))
        cpu = size / taken.cpu_seconds
        rows.append(_speed(work, "MB per CPU second", cpu, [size / peer.cpu_seconds for peer in peers]))
    found["verify"] = _convert("verify", run, exported, "--no-logits")
    # The largest group is the embedding, or gate and up projection.
    group = 2 * max(2 * llama["intermediate_size"], llama["vocab_size"] + 64) * llama["hidden_size"] / _GIB
    for verb, taken in found.items():
        bound = min(_MAX_GIB, 1.5 * group + 1)
        row = Row(work=f"{verb}, peak memory", unit="GiB", ours=taken.gibibytes, required=bound, judged="at most")
        rows.append(row)
    return rows


def _speed(work: str, unit: str, ours: float, peers: list[float]) -> Row:
    return Row(work=work, unit=unit, ours=ours, peers={_PEER: sum(peers) / len(peers)}, required=1 / _MAX_TIME)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=32, help="layers of the Llama (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few megabytes")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--in-this-process", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)


def main() -> int:
    """Run the benchmark."""
    args = parse_arguments(__doc__, _add_options)
    if args.in_this_process:
        copy_and_hash(*args.in_this_process)
        return 0
    if args.write:
        part, settings, folder = args.write
        Path(folder).parent.mkdir(exist_ok=True)
        {"llama": write_llama, "clip": write_clip}[part](Path(folder), json.loads(settings))
        return 0
    llama = {**(_TINY if args.tiny else _WHOLE), "num_hidden_layers": 2 if args.tiny else args.layers}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), llama, _TINY_TOWER if args.tiny else _TOWER)
    return report(rows, args.json, [describe_versions("torch", "megatron-core", "safetensors")])


if __name__ == "__main__":
    sys.exit(main())
