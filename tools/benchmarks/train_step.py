"""One optimizer step of the training loop against other ways to do it, in real tokens per CPU second of one thread.

    python tools/benchmarks/train_step.py --json train_step.json

A ViT of 192 x 4 and a decoder of 256 x 8 with 32,000 pieces, fp32, rows of 1,024 positions that the project's packer
filled with pairs and interleaved documents. Ours is the state and the `train_step` of `megatron-vlm train` with its
default settings; it leaves out the positions behind the last sample of a row. Peers, from the same weights, on the same
pixels and rows:

    LLaVA's loop: one sample a row, padded to the longest of a batch of 16 or of 4, embeddings concatenated sample by
        sample, transformers' Llama and CLIP, logits at every position, AdamW parameter by parameter
    transformers packed, dense mask: one row as one sequence under a block-diagonal mask, otherwise the same
    transformers packed, logits at labels: with fused AdamW, too
    plain PyTorch: packed, one attention call per sample, joined projections, logits at labels, fused AdamW

Every way runs in a process of its own. They take turns step by step, so that a busy machine slows all of them alike,
and must agree on each step's loss (1e-5) and gradient norm (1e-4). Speeds are of the fastest step of each; the notes
give the ratios of medians.
"""

import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from report import Row, describe_versions, how_to_install, is_installed, parse_arguments, report

_SIZE, _PATCH, _SEQ_LENGTH, _VOCAB_SIZE = 224, 16, 1024, 32000
_NUM_IMAGE_TOKENS = (_SIZE // _PATCH) ** 2
_OURS = "ours"
_OF_LLAVA = {"frozen": 2.8, "trained": 2.8}
_REQUIRED = {"plain": {"frozen": 1.05, "trained": 1.0}, "llava": _OF_LLAVA, "llava_small": _OF_LLAVA}
_PEERS = ("llava", "llava_small", "dense_mask", "label_logits", "plain")
# float32: sums of up to 10^5 terms in another order; the norm is over gradients that differ by as much.
_LOSS_TOLERANCE, _NORM_TOLERANCE = 1e-5, 1e-4
_STEPS_OF_A_PLAN = 10_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process does."""

    way: str
    freeze_tower: bool
    rows: int
    """Rows of a step."""
    weights: Path
    """File of the tensors under Hugging Face's names; ours writes it, the peers read it."""


def make_samples(number: int) -> list[Any]:
    """Return `number` samples: half pairs of one image, half documents of text with one to four images."""
    import io

    from PIL import Image

    from megatron_vlm.data.loading.collate import PlacedSample
    from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment

    rng = np.random.default_rng(0)

    def tokens(low: int, high: int) -> TextSegment:
        ids = rng.integers(3, _VOCAB_SIZE, rng.integers(low, high)).astype(np.int32)
        return TextSegment(ids, True)

    def image() -> ImageSegment:
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (_SIZE, _SIZE, 3), dtype=np.uint8)).save(stream, "PNG", compress_level=0)
        return ImageSegment(stream.getvalue(), (_SIZE, _SIZE))

    samples = []
    for index in range(number):
        segments: list[TextSegment | ImageSegment] = [TextSegment(np.array([1], dtype=np.int32), True)]
        if index % 2:
            segments += [image(), tokens(8, 40)]
        else:
            for _ in range(rng.integers(1, 5)):
                segments += [tokens(8, 60), image()]
            segments.append(tokens(4, 40))
        samples.append(PlacedSample(EncodedSample(tuple(segments)), index, 0, f"sample {index}"))
    return samples


def make_batches(config: Any, rows: int, *, position_multiple: int | None) -> list[Any]:
    """Pack samples into rows and return micro-batches of one row each: the first `rows` of a random order.

    Args:
        config: of the run.
        rows: how many.
        position_multiple: of `Collation`; None: with all positions.
    """
    from megatron_vlm.data.loading.collate import Collation, collate
    from megatron_vlm.data.plan.image_tokens import ImageTokens
    from megatron_vlm.data.plan.packing import pack_samples
    from megatron_vlm.parallel.slicing import ImageShare

    samples, model = make_samples(24 * rows), config.model
    collation = Collation(
        seq_length=_SEQ_LENGTH,
        image_tokens=ImageTokens(_NUM_IMAGE_TOKENS),
        vocab_size=_VOCAB_SIZE,
        image_token_id=model.language.image_token_id,
        pad_token_id=model.language.pad_token_id,
        image_size=_SIZE,
        image_aspect="square",
        image_mean=model.vision.image_mean,
        position_multiple=position_multiple,
    )
    lengths = np.array([sum(map(collation.image_tokens.of_segment, one.sample.segments)) for one in samples])
    rng = np.random.default_rng(1)
    packed = pack_samples(lengths, _SEQ_LENGTH, rng)
    chosen = rng.permutation(len(packed.borders) - 1)[:rows]
    members = [packed.order[packed.borders[row] : packed.borders[row + 1]] for row in chosen]
    return [collate([[samples[index] for index in row]], collation, ImageShare()) for row in members]


def make_config(job: Job) -> Any:
    """Return a run with default settings, in fp32."""
    from megatron_vlm.config import (
        BlendEntry,
        DataConfig,
        LanguageConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        TrainConfig,
        TrainingConfig,
    )
    from megatron_vlm.config.projectors import make_projector
    from megatron_vlm.config.towers.clip import Config as ClipConfig

    return TrainConfig(
        stage="pretrain",
        run_dir="unused",
        model=ModelConfig(
            language=LanguageConfig(
                vocab_size=_VOCAB_SIZE, num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4
            ),
            vision=ClipConfig(
                image_size=_SIZE,
                patch_size=_PATCH,
                num_layers=4,
                hidden_size=192,
                ffn_hidden_size=768,
                num_attention_heads=3,
                feature_layer=-1,
            ),
            projection=make_projector("mlp2x_gelu"),
        ),
        data=DataConfig(tokenizer="unused", blend=(BlendEntry(path="unused"),), seq_length=_SEQ_LENGTH),
        optimizer=OptimizerConfig(lr=1e-4, lr_decay_style="constant", lr_warmup_iters=0),
        training=TrainingConfig(
            global_batch_size=job.rows,
            train_iters=_STEPS_OF_A_PLAN,
            precision="fp32",
            freeze=("vision_model",) if job.freeze_tower else (),
        ),
        parallel=ParallelConfig(),
    )


class SameRows:
    """Stands for a plan in which every step has the same rows."""

    hash = "benchmark"
    hashes = SimpleNamespace(data="benchmark", settings="benchmark", datasets=())
    stable_iterations = num_iterations = _STEPS_OF_A_PLAN

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def seq_length(self, iteration: int) -> int:
        """Return the length of a row."""
        return _SEQ_LENGTH

    def datasets_until(self, iteration: int) -> tuple[str, ...]:
        """Return that there are no datasets."""
        return self.hashes.datasets

    def rows(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of a step and how many each row holds."""
        ids = np.concatenate([batch.sample_ids.numpy() for batch in self.batches])
        return ids, np.concatenate([batch.samples_per_row.numpy() for batch in self.batches])


class Ours:
    """The state and step of `megatron-vlm train` on one rank."""

    def __init__(self, job: Job) -> None:
        from megatron_vlm.platform.device import prepare_process

        device = prepare_process()

        import torch

        from megatron_vlm.config import position_multiple
        from megatron_vlm.parallel.groups import start_distributed
        from megatron_vlm.training.setup import build_state

        config = make_config(job)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        rank = start_distributed(config.parallel, device)
        self.batches = make_batches(config, job.rows, position_multiple=position_multiple(config))
        plan: Any = SameRows(self.batches)
        self.state = build_state(config, rank, plan, ("benchmark",))
        self.device = device
        torch.save(under_their_names(self.state.chunks[0], config.model), job.weights)

    def step(self) -> tuple[float, float]:
        """Do a step and return loss and gradient norm."""
        from megatron_vlm.training.step import train_step

        metrics = train_step(self.state, [iter(self.batches)], device=self.device, stop_requested=False)
        self.state.iteration += 1
        return metrics.loss, metrics.grad_norm


class Theirs:
    """A peer."""

    def __init__(self, job: Job) -> None:
        import torch
        from step_peers import Peer, Setting

        config = make_config(job)
        self.batches = make_batches(config, job.rows, position_multiple=None)
        setting = Setting(model=config.model, optimizer=config.optimizer, freeze_tower=job.freeze_tower)
        kind: Any = job.way
        self.peer = Peer(kind, setting, torch.load(job.weights))

    def step(self) -> tuple[float, float]:
        """Do a step and return loss and gradient norm."""
        return self.peer.step(self.batches)


def under_their_names(chunk: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Return the weights of our model under Hugging Face's names, by part."""
    from megatron_vlm.convert.families import clip, llama
    from megatron_vlm.convert.projectors import mlp2x_gelu

    ours = {name: value.detach().clone() for name, value in chunk.named_parameters()}
    sizes = {"input_size": model.vision.feature_size, "output_size": model.language.hidden_size}
    tables = {
        "vision": clip.rules(model.vision),
        "projection": mlp2x_gelu.llava(model.projection, **sizes).rules,
        "language": llama.rules(model.language),
    }
    weights: dict[str, dict[str, Any]] = {part: {} for part in tables}
    for part, rules in tables.items():
        for rule in rules:
            for layer in rule.layers:
                name = rule.key.removeprefix("model.").replace("decoder.layers.", f"decoder.layers.{layer}.")
                name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
                name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
                tensors = rule.transform.split(ours[name])
                weights[part].update(zip(rule.names_of(layer), [t.contiguous() for t in tensors], strict=True))
    return weights


def work(job: Job, pipe: Connection) -> None:
    """Do a step whenever the other end asks for one, and answer with loss, gradient norm and CPU seconds."""
    import torch

    torch.set_num_threads(1)
    way: Ours | Theirs = Ours(job) if job.way == _OURS else Theirs(job)
    pipe.send([(batch.num_tokens, batch.num_positions) for batch in way.batches])
    while pipe.recv():
        started = time.process_time()
        loss, norm = way.step()
        pipe.send((loss, norm, time.process_time() - started))


class Worker:
    """A process that does the steps of one way."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(job, theirs))
        self.process.start()
        theirs.close()
        self.rows: list[tuple[int, int]] = self.pipe.recv()
        """Tokens and positions of each row."""

    def step(self) -> tuple[float, float, float]:
        """Return loss, gradient norm and CPU seconds of its next step."""
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(False)
        self.process.join()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of all ways with the tower frozen, or with it trained."""

    tower: str
    seconds: dict[str, list[float]]
    """CPU time of each step, by way."""
    num_tokens: int
    num_positions: int


def measure(tower: str, rows: int, rounds: int, ways: Sequence[str]) -> Measured:
    """Let all ways do `rounds` steps in turns, after one that is not counted.

    Raises:
        ValueError: a way computes another loss or gradient norm than ours.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="train_step_benchmark_") as folder:
        workers: dict[str, Worker] = {}
        try:
            for way in ways:
                job = Job(way=way, freeze_tower=tower == "frozen", rows=rows, weights=Path(folder) / "weights.pt")
                workers[way] = Worker(job)
            for number in range(rounds + 1):
                for way, step in _steps(workers, number):
                    if number:
                        seconds[way].append(step)
            tokens, positions = (sum(column) for column in zip(*workers[_OURS].rows, strict=True))
        finally:
            for worker in workers.values():
                worker.close()
    return Measured(tower=tower, seconds=seconds, num_tokens=tokens, num_positions=positions)


def _steps(workers: dict[str, Worker], number: int) -> Iterator[tuple[str, float]]:
    """Let each way do a step, yield its CPU time, and compare its results with ours."""
    results = {}
    for way, worker in workers.items():
        *results[way], taken = worker.step()
        yield way, taken
        for what, theirs, ours, tolerance in zip(
            ("loss", "gradient norm"), results[way], results[_OURS], (_LOSS_TOLERANCE, _NORM_TOLERANCE), strict=True
        ):
            if not abs(theirs - ours) <= tolerance * abs(ours):
                raise ValueError(f"{what} of {way} at step {number + 1} is {theirs}, ours is {ours}")


def rows_of(measured: Measured) -> list[Row]:
    """Return a row for each peer; those without a requirement only have to be no faster than ours."""
    from step_peers import NAMES

    speeds = {way: measured.num_tokens / min(taken) for way, taken in measured.seconds.items()}
    return [
        Row(
            work=f"training step, tower {measured.tower}",
            unit="real tokens per CPU second",
            ours=speeds[_OURS],
            peers={NAMES[way]: speeds[way]},
            required=_REQUIRED.get(way, {}).get(measured.tower, 1.0),
        )
        for way in measured.seconds
        if way != _OURS
    ]


def notes_of(measured: Measured) -> list[str]:
    """Return the ratios of the medians, and how full the rows are."""
    ours = float(np.median(measured.seconds[_OURS]))
    ratios = ", ".join(
        f"{way} {float(np.median(taken)) / ours:.2f}x" for way, taken in measured.seconds.items() if way != _OURS
    )
    filled = measured.num_tokens / measured.num_positions
    return [f"tower {measured.tower}: by medians {ratios}; the packed rows are {filled:.1%} full"]


def main() -> int:
    """Run the benchmark."""

    def add(parser):
        parser.add_argument("--rows", type=int, default=4, help="rows of a step (default: %(default)s)")
        parser.add_argument(
            "--rounds", type=int, default=5, help="rounds in which all take turns (default: %(default)s)"
        )
        parser.add_argument("--tower", choices=("frozen", "trained", "both"), default="both")
        parser.add_argument("--peers", nargs="+", choices=_PEERS, default=_PEERS, help="only these")

    arguments = parse_arguments(__doc__, add)
    from step_peers import TRANSFORMERS

    peers = list(arguments.peers)
    notes = [f"{platform.processor() or platform.machine()}: {_processor()}, one thread, CPU seconds"]
    if not is_installed("transformers"):
        peers = [peer for peer in peers if peer not in TRANSFORMERS]
        notes.append(how_to_install("transformers"))
    towers = ("frozen", "trained") if arguments.tower == "both" else (arguments.tower,)
    results = [measure(tower, arguments.rows, arguments.rounds, [_OURS, *peers]) for tower in towers]
    rows = [row for measured in results for row in rows_of(measured)]
    notes += [note for measured in results for note in notes_of(measured)]
    return report(rows, arguments.json, [*notes, describe_versions("torch", "megatron-core", "transformers")])


def _processor() -> str:
    """Return the name of the processor, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


if __name__ == "__main__":
    sys.exit(main())
