"""Preparation in samples per CPU second of one process: tokenize, keep the JPEG, check its header, add checksums.

    python tools/benchmarks/prepare.py --json prepare.json

Peers: megatron-core's IndexedDatasetBuilder in the loop of Megatron-LM's tools/preprocess_mmdata.py (tokens, then the
bytes of the image, neither checked), and energon's preparation of the same tars with media metadata, which also reads
the header of every image. Energon writes no tokens and copies no images. A note gives the speed of its plain index,
which reads only the headers of the tar.
"""

import contextlib
import io
import json
import logging
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from corpora import Corpus
from report import Row, cpu_seconds, describe_versions, how_to_install, is_installed, parse_arguments, report

from megatron_vlm.platform.device import prepare_process

prepare_process()

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from megatron_vlm.cli.main import main as megatron_vlm  # noqa: E402

_BUILDER, _ENERGON = "IndexedDatasetBuilder", "energon prepare --media-metadata-by-extension"
_ENERGON_INDEX = "energon prepare"
_IMAGE, _MAX_IMAGES = 1, 6


class Builder:
    """What Megatron-LM's script does with a sample."""

    def __init__(self, prefix: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self._prefix, self._tokenizer = prefix, tokenizer
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint8, multimodal=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text)

    def add_text(self, ids: list[int]) -> None:
        """Add token ids as they lie in memory."""
        if ids:
            self._builder.add_item(torch.from_numpy(np.array(ids, dtype=np.int32).view(np.uint8)))

    def add_image(self, encoded: bytes) -> None:
        """Add an image file."""
        self._builder.add_item(torch.from_numpy(np.frombuffer(encoded, dtype=np.uint8)), _IMAGE)

    def end_document(self) -> None:
        """End the sample."""
        self._builder.end_document()

    def close(self) -> None:
        """Write the index."""
        self._builder.finalize(f"{self._prefix}.idx")


def build_pairs(builder: Builder, tar_file: Path) -> None:
    """Read a tar of pairs with Python's tarfile, like webdataset, and build the dataset."""
    waiting: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar_file) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            if extension == "json":
                continue
            sample = waiting.setdefault(key, {})
            sample[extension] = tar.extractfile(member).read()
            if len(sample) == 2:
                builder.add_image(sample["jpg"])
                builder.add_text([1, *builder.encode(sample["txt"].decode()), 2])
                builder.end_document()
                del waiting[key]
    builder.close()


def build_documents(builder: Builder, folder: Path) -> None:
    """Read an MMC4 shard, put each image before its sentence, and build the dataset."""
    with (folder / "docs_shard_0_v3.jsonl").open() as stream:
        for line in stream:
            record = json.loads(line)
            places: dict[int, list[str]] = {}
            for info in record["image_info"][:_MAX_IMAGES]:
                places.setdefault(info["matched_text_index"], []).append(info["image_name"])
            ids, run = [1], []
            for number, sentence in enumerate(record["text_list"]):
                for name in places.get(number, ()):
                    builder.add_text(ids + (builder.encode(" ".join(run)) if run else []))
                    ids, run = [], []
                    builder.add_image((folder / "images" / name).read_bytes())
                run.append(sentence)
            builder.add_text([*ids, *builder.encode(" ".join(run)), 2])
            builder.end_document()
    builder.close()


def run_ours(*arguments: object, tokenizer: Path, output: Path) -> None:
    """Run the real command in this process, on a copy of the tokenizer because words are cached by file."""
    shutil.rmtree(output, ignore_errors=True)
    fresh = shutil.copy(tokenizer, output.with_name(f"{time.monotonic_ns()}.model"))
    arguments += ("--tokenizer", fresh, "--output", output, "--workers", "1")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if megatron_vlm(["prepare", *map(str, arguments)]) != 0:
            raise SystemExit("prepare failed")


def check_equal(folder: Path) -> None:
    """Make sure that both wrote the same tokens and images; BOS is elsewhere, but the sizes are equal."""
    ours, peer = (folder / name for name in ("ours/00000.bin", "peer.bin"))
    if ours.stat().st_size != peer.stat().st_size:
        raise SystemExit(f"ours wrote {ours.stat().st_size} bytes, {_BUILDER} {peer.stat().st_size}")


def make_energon(tar_file: Path) -> dict[str, Callable[[], None]]:
    """Return energon's two ways to prepare the folder of a tar with one worker."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
    from megatron.energon.media.extractor import MediaFilterConfig

    folder = tar_file.parent

    def prepare(media: bool) -> None:
        shutil.rmtree(folder / ".nv-meta", ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            WebdatasetPreparator.prepare_dataset(
                folder,
                [tar_file.name],
                split_parts_ratio=[("train", 1.0)],
                workers=1,
                media_filter=MediaFilterConfig.parse(None, header=False, extension=True) if media else None,
            )

    return {_ENERGON: lambda: prepare(True), _ENERGON_INDEX: lambda: prepare(False)}


def measure_pairs(folder: Path, number: int, rounds: int, tokenizer: Path, corpus: Corpus) -> tuple[list[Row], list]:
    """Compare `prepare pairs`; returns rows and notes."""
    tar_file = folder / "pairs" / "00000.tar"
    tar_file.parent.mkdir()
    corpus.write_pairs(tar_file, number)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    has_energon, ours = is_installed("megatron.energon"), folder / "ours"
    seconds = cpu_seconds(
        rounds,
        {
            "ours": lambda: run_ours("pairs", "--input", tar_file, tokenizer=tokenizer, output=ours),
            _BUILDER: lambda: build_pairs(Builder(folder / "peer", processor), tar_file),
            **(make_energon(tar_file) if has_energon else {}),
        },
    )
    check_equal(folder)
    speeds = {name: number / taken for name, taken in seconds.items()}
    work, unit = f"prepare pairs, {number} samples", "samples per CPU second"
    rows = [
        Row(work=work, unit=unit, ours=speeds["ours"], peers={peer: speeds[peer]} if peer in speeds else {}, required=r)
        for peer, r in ((_BUILDER, 1.0), (_ENERGON, 4.0))
    ]
    if not has_energon:
        return rows, [how_to_install("megatron-energon")]
    index = speeds[_ENERGON_INDEX]
    return rows, [f"{_ENERGON_INDEX}, which reads only the headers of the tar: {index:.0f} samples per CPU second"]


def measure_documents(folder: Path, number: int, rounds: int, tokenizer: Path, corpus: Corpus) -> Row:
    """Compare `prepare interleaved`."""
    corpus.write_documents(folder / "mmc4", number)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    arguments = ("interleaved", "--input", folder / "mmc4", "--images", folder / "mmc4" / "images")
    seconds = cpu_seconds(
        rounds,
        {
            "ours": lambda: run_ours(*arguments, tokenizer=tokenizer, output=folder / "ours"),
            _BUILDER: lambda: build_documents(Builder(folder / "peer", processor), folder / "mmc4"),
        },
    )
    check_equal(folder)
    return Row(
        work=f"prepare interleaved, {number} documents",
        unit="documents per CPU second",
        ours=number / seconds["ours"],
        peers={_BUILDER: number / seconds[_BUILDER]},
        required=1.0,
    )


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("--samples", type=int, default=5000, help="pairs (default: %(default)s)")
        parser.add_argument("--documents", type=int, default=500, help="MMC4 documents (default: %(default)s)")
        parser.add_argument(
            "--rounds", type=int, default=7, help="rounds in which all take turns (default: %(default)s)"
        )
        parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: train one of 8000 pieces)")

    arguments = parse_arguments(__doc__, add)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="prepare_benchmark_"))
    try:
        corpus = Corpus()
        tokenizer = arguments.tokenizer or corpus.train_tokenizer(folder)
        rows, notes = measure_pairs(folder, arguments.samples, arguments.rounds, tokenizer, corpus)
        rows.append(measure_documents(folder, arguments.documents, arguments.rounds, tokenizer, corpus))
        notes.append(describe_versions("megatron-core", "megatron-energon", "sentencepiece", "torch"))
        return report(rows, arguments.json, notes)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
