"""Packed loading of image-text pairs at 224 pixels, in real tokens per CPU second of one process.

    python tools/benchmarks/load.py --json load.json

Peers: LLaVA's loading (JSON records, the Hugging Face CLIP processor on Pillow, tokenizing at each read, padding to
the longest sample of the batch), and megatron-core's IndexedDataset with the same pixels through Pillow.
"""

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from corpora import make_jpeg
from PIL import Image
from report import Row, cpu_seconds, describe_versions, how_to_install, is_installed, parse_arguments, report

from megatron_vlm.data.plan.image_tokens import ImageTokens
from megatron_vlm.platform.device import prepare_process

prepare_process()

from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

from megatron_vlm.config import BlendEntry  # noqa: E402
from megatron_vlm.data.loading.collate import Collation  # noqa: E402
from megatron_vlm.data.loading.loader import BatchLoader  # noqa: E402
from megatron_vlm.data.plan.plan import build_plan  # noqa: E402
from megatron_vlm.data.plan.settings import PlanSettings  # noqa: E402
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment  # noqa: E402
from megatron_vlm.data.shards.dataset import ShardedDataset  # noqa: E402
from megatron_vlm.data.shards.writer import write_dataset  # noqa: E402
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

_SIZE, _NUM_IMAGE_TOKENS, _SEQ_LENGTH = 224, 256, 4096
_BATCH = 15
_SHAPES = ((640, 480), (500, 375), (480, 640), (400, 600), (336, 448))
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_LLAVA, _INDEXED = "LLaVA's dataset + processor", "IndexedDataset + Pillow"
_WORDS = "a the photo of red green blue small large cat dog house tree with on under near and sky water street".split()


class LlavaDataset:
    """LLaVA's LazySupervisedDataset and collator, reduced to pairs."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        from transformers import CLIPImageProcessor

        self.folder, self.tokenizer = folder, tokenizer
        self.records = json.loads((folder / "pairs.json").read_text())
        self.processor = CLIPImageProcessor(size={"shortest_edge": _SIZE}, crop_size={"height": _SIZE, "width": _SIZE})

    def count_tokens(self, numbers: range) -> int:
        """Make one batch and return its tokens, image tokens included."""
        ids, pictures = [], []
        for number in numbers:
            record = self.records[number]
            image = Image.open(self.folder / record["image"]).convert("RGB")
            pictures.append(self.processor.preprocess(image, return_tensors="pt")["pixel_values"][0])
            ids.append(torch.tensor([1, *self.tokenizer.encode(record["caption"]), 2]))
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        torch.stack(pictures)
        return sum(map(len, ids)) + len(pictures) * _NUM_IMAGE_TOKENS


def count_tokens_indexed(dataset: IndexedDataset, numbers: range) -> int:
    """Make one batch from megatron-core's dataset with Pillow's pixels."""
    tokens, pictures = 0, []
    for number in numbers:
        for sequence in range(*dataset.document_indices[number : number + 2]):
            content, mode = dataset[sequence]
            if mode != 1:
                tokens += len(content) // 4
                continue
            image = Image.open(io.BytesIO(content.tobytes())).convert("RGB")
            scale = _SIZE / min(image.size)
            image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
            left, top = (image.width - _SIZE) // 2, (image.height - _SIZE) // 2
            square = image.crop((left, top, left + _SIZE, top + _SIZE))
            pictures.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    torch.stack(pictures)
    return tokens + len(pictures) * _NUM_IMAGE_TOKENS


def prepare(folder: Path, number: int) -> Tokenizer:
    """Write the same pairs for all three methods."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(_WORDS, rng.integers(5, 30))) for _ in range(number)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        byte_fallback=True,
        vocab_size=350,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(folder / "tiny.model")
    samples, records = [], []
    for number, caption in enumerate(captions):
        shape = _SHAPES[number % len(_SHAPES)]
        encoded = make_jpeg(*shape, rng)
        (folder / f"{number}.jpg").write_bytes(encoded)
        records.append({"image": f"{number}.jpg", "caption": caption})
        begin, text = TextSegment(np.array([1]), True), np.array([*tokenizer.encode(caption), 2])
        samples.append(EncodedSample((begin, ImageSegment(encoded, shape), TextSegment(text, True))))
    (folder / "pairs.json").write_text(json.dumps(records))
    write_dataset(folder / "shards", samples, dataset_name="pairs", tokenizer=tokenizer.facts)
    return tokenizer


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("--samples", type=int, default=240, help="pairs (default: %(default)s)")
        parser.add_argument(
            "--rounds", type=int, default=11, help="rounds in which all take turns (default: %(default)s)"
        )

    arguments = parse_arguments(__doc__, add)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="load_benchmark_"))
    try:
        rows = _measure(folder, arguments.samples, arguments.rounds)
        notes = [] if is_installed("transformers") else [how_to_install("transformers")]
        notes.append(describe_versions("megatron-core", "transformers", "pillow", "simplejpeg", "torch"))
        return report(rows, arguments.json, notes)
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, number: int, rounds: int) -> list[Row]:
    tokenizer = prepare(folder, number)
    datasets = [ShardedDataset.open(folder / "shards")]
    settings = PlanSettings(
        blend=(BlendEntry(path=str(folder / "shards")),),
        seq_length=_SEQ_LENGTH,
        image_tokens=ImageTokens(_NUM_IMAGE_TOKENS),
        packing=True,
        overflow="fail",
        seed=1,
        global_batch_size=1,
        train_iters=None,
        train_epochs=1.0,
    )
    plan = build_plan(settings, datasets, folder / "plan")
    collation = Collation(
        seq_length=_SEQ_LENGTH,
        image_tokens=ImageTokens(_NUM_IMAGE_TOKENS),
        vocab_size=tokenizer.vocab_size,
        image_token_id=tokenizer.vocab_size,
        pad_token_id=tokenizer.vocab_size + 1,
        image_size=_SIZE,
        image_aspect="square",
        image_mean=_MEAN,
    )
    indexed = IndexedDataset(str(folder / "shards" / "00000"), multimodal=True)
    batches = [range(first, min(first + _BATCH, number)) for first in range(0, number, _BATCH)]
    work = {
        "ours": lambda: sum(batch.num_tokens for batch in BatchLoader(datasets, plan, collation=collation)),
        _INDEXED: lambda: sum(count_tokens_indexed(indexed, batch) for batch in batches),
    }
    if is_installed("transformers"):
        llava = LlavaDataset(folder, tokenizer)
        work[_LLAVA] = lambda: sum(llava.count_tokens(batch) for batch in batches)
    (tokens,) = {run() for run in work.values()}  # all load the same
    speeds = {name: tokens / seconds for name, seconds in cpu_seconds(rounds, work).items()}
    return [
        Row(
            work=f"packed loading at {_SIZE} pixels",
            unit="real tokens per CPU second",
            ours=speeds["ours"],
            peers={peer: speeds[peer]} if peer in speeds else {},
            required=required,
        )
        for peer, required in ((_LLAVA, 2.5), (_INDEXED, 1.9))
    ]


if __name__ == "__main__":
    sys.exit(main())
