"""The measurements of gpu_check.py; each runs in a process of its own, so that one that fails or hangs ends alone.

python tools/gpu_sections.py layers --result layers.json --config CONFIG --layers 4 --images 6 --rounds 10
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlm.platform.device import distributed_backend, prepare_process

DEVICE = prepare_process()

import torch  # noqa: E402

from megatron_vlm.config import ConfigError, TrainConfig, UserError, load_config  # noqa: E402
from megatron_vlm.costs.cluster import Cluster  # noqa: E402
from megatron_vlm.costs.flops import Work, step_flops  # noqa: E402
from megatron_vlm.costs.memory import estimate_memory  # noqa: E402
from megatron_vlm.costs.stage_time import micro_batch_times  # noqa: E402
from megatron_vlm.data.loading.batch import VLMBatch  # noqa: E402
from megatron_vlm.data.loading.collate import Collation, PlacedSample, collate  # noqa: E402
from megatron_vlm.data.samples import EncodedSample, ImageSegment, TextSegment  # noqa: E402
from megatron_vlm.parallel.groups import start_distributed, stop_distributed  # noqa: E402
from megatron_vlm.parallel.slicing import ImageShare  # noqa: E402
from megatron_vlm.platform.gpus import GPUS  # noqa: E402
from megatron_vlm.platform.machine import check_capability, check_requirements  # noqa: E402
from megatron_vlm.training.objective import run_model  # noqa: E402
from megatron_vlm.training.setup import build_state  # noqa: E402
from megatron_vlm.training.state import TrainState  # noqa: E402
from megatron_vlm.training.step import update_weights  # noqa: E402

# A photograph as the corpora have them: sides in pixels, quality of the JPEG.
_PHOTO, _QUALITY = (640, 480), 85
_IMAGES_PER_SAMPLE = 2
_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class OneRow:
    """Stands for a plan of rows that the section makes itself."""

    length: int
    num_iterations: int = 1_000_000
    hash: str = "check"

    def seq_length(self, iteration: int) -> int:
        """Return the length of a row [tokens]."""
        return self.length


def make_row(config: TrainConfig, num_images: int) -> list[PlacedSample]:
    """Return samples that fill a row: photographs, and text with a loss for the rest of the positions."""
    rng, per_image = np.random.default_rng(0), config.model.fixed_image_tokens("the check of a GPU")
    counts = [min(_IMAGES_PER_SAMPLE, num_images - first) for first in range(0, num_images, _IMAGES_PER_SAMPLE)] or [0]
    num_text = config.data.seq_length - num_images * per_image
    if num_text < 2 * len(counts):
        raise ConfigError(f"{num_images} images leave {num_text} of {config.data.seq_length} positions for text")
    samples = []
    for index, count in enumerate(counts):
        size = num_text // len(counts) + (num_text % len(counts) if index == 0 else 0)
        text = TextSegment(rng.integers(3, config.model.language.vocab_size, size).astype(np.int32), True)
        images = [ImageSegment(_photo(rng), _PHOTO) for _ in range(count)]
        samples.append(PlacedSample(EncodedSample((*images, text)), index, 0, f"sample {index}"))
    return samples


def _photo(rng: np.random.Generator) -> bytes:
    width, height = _PHOTO
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize(_PHOTO, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def make_batch(config: TrainConfig, num_images: int) -> VLMBatch:
    """Return the row as a micro-batch, its images decoded."""
    return collate([make_row(config, num_images)], Collation.from_config(config.model, config.data), ImageShare())


@dataclass
class Marks:
    """Points in time of the device's work, by name; all of them are read after the device is done."""

    at: dict[str, Any] = field(default_factory=dict)

    def set(self, name: str) -> None:
        """Note the present point of the device's work."""
        if DEVICE.type == "cuda":
            self.at[name] = torch.cuda.Event(enable_timing=True)
            self.at[name].record()
        else:
            self.at[name] = time.perf_counter()

    def seconds(self, first: str, last: str) -> float:
        """Return the time from one mark to another."""
        if DEVICE.type == "cuda":
            return self.at[first].elapsed_time(self.at[last]) / 1e3
        return self.at[last] - self.at[first]


def _watch(state: TrainState, marks: Marks) -> None:
    """Set marks around the tower with its projection, and around the decoder layers, forward and backward."""
    model = state.chunks[0]
    model.vision_model.register_forward_pre_hook(lambda *_: marks.set("tower"))
    model.vision_projection.register_forward_hook(lambda *_: marks.set("tower done"))

    def enter(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        marks.set("layers")
        options["hidden_states"].register_hook(lambda grad: marks.set("layers back done"))

    def leave(module: Any, arguments: Any, output: torch.Tensor) -> None:
        marks.set("layers done")
        output.register_hook(lambda grad: marks.set("layers back"))

    model.language_model.decoder.register_forward_pre_hook(enter, with_kwargs=True)
    model.language_model.decoder.register_forward_hook(leave)


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _pass(state: TrainState, batch: VLMBatch, marks: Marks) -> dict[str, float]:
    """Do a forward and a backward pass and return its times [s]."""
    state.wrapped[0].zero_grad_buffer()
    _synchronize()
    marks.set("start")
    run_model(state.wrapped[0], batch).sum().backward()
    marks.set("end")
    _synchronize()
    layers = marks.seconds("layers", "layers done") + marks.seconds("layers back", "layers back done")
    tower, whole = marks.seconds("tower", "tower done"), marks.seconds("start", "end")
    return {"whole": whole, "tower": tower, "layers": layers, "rest": whole - tower - layers}


def _work(config: TrainConfig, batch: VLMBatch) -> Work:
    lengths = batch.cu_seqlens.long().diff()
    return Work(
        num_tokens=batch.num_tokens,
        attention_pairs=int((lengths * (lengths + 1) // 2).sum()),
        num_labels=batch.label_index.numel(),
        num_images=batch.num_images,
    )


def measure_layers(config: TrainConfig, num_images: int, rounds: int, full_layers: int) -> dict[str, Any]:
    """Measure forward and backward passes of one row, an optimizer step and its memory.

    Args:
        config: a model with as many decoder layers as fit.
        num_images: in the row.
        rounds: passes that count; the median is taken.
        full_layers: decoder layers of the whole model, for what follows from the figures of one layer.
    """
    batch = make_batch(config, num_images)
    work, num_layers = _work(config, batch), config.model.language.num_layers
    state = build_state(
        config, start_distributed(config.parallel, DEVICE), OneRow(length=config.data.seq_length), ("check",)
    )
    on_device, marks = batch.to(DEVICE), Marks()
    _watch(state, marks)
    passes = [_pass(state, on_device, marks) for _ in range(_WARM_UP + rounds)][_WARM_UP:]
    seconds = {name: statistics.median(one[name] for one in passes) for name in passes[0]}
    layer = seconds["layers"] / num_layers
    full = seconds["tower"] + seconds["rest"] + full_layers * layer
    flops = step_flops(config.model, config.training.freeze, work)
    return {
        "num_layers": num_layers,
        "num_tokens": work.num_tokens,
        "num_images": num_images,
        "num_labels": work.num_labels,
        "layer_ms": 1e3 * layer,
        "tower_ms": 1e3 * seconds["tower"],
        "embedding_output_and_loss_ms": 1e3 * seconds["rest"],
        "forward_backward_ms": 1e3 * seconds["whole"],
        "planned": plan_pass(config, work, _gpu_name(), seconds["whole"]),
        "mfu": _mfu(flops.total, seconds["whole"]),
        "mfu_of_layers": _mfu(sum(flops.layers), seconds["layers"]),
        "counted_tflop": flops.total / 1e12,
        "whole_model": {"num_layers": full_layers, "seconds_per_row": full, "tower_share": seconds["tower"] / full},
        "optimizer_step": _measure_step(state, batch),
    }


def _measure_step(state: TrainState, batch: VLMBatch) -> dict[str, Any]:
    """Do two optimizer steps; return time and memory of the second, and what `plan` says about the memory."""
    for _ in range(2):
        _synchronize()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        update_weights(state, [iter([batch])], device=DEVICE, stop_requested=False)
        _synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
    planned = estimate_memory(state.config, 0, 1).total / 2**30
    return {
        "ms": 1e3 * seconds,
        "peak_gib": peak,
        "planned_gib": planned,
        "planned_over_measured": None if peak is None else planned / peak,
    }


def plan_pass(config: TrainConfig, work: Work, gpu_name: str | None, seconds: float) -> dict[str, float] | None:
    """Return what `plan --layouts` predicts for the pass, by what it is spent on; None for a GPU that it does not know.

    Args:
        config: settings of the one rank.
        work: contents of the row.
        gpu_name: key of `GPUS`.
        seconds: measured for the pass [s].
    """
    if gpu_name is None:
        return None
    forward, backward = micro_batch_times(config, 0, work, Cluster(gpu_name=gpu_name), 1)
    both = forward + backward
    parts = {f"{name}_ms": 1e3 * value for name, value in asdict(both).items()}
    return {"forward_backward_ms": 1e3 * both.total, **parts, "planned_over_measured": both.total / seconds}


def _gpu_name() -> str | None:
    """Return the name of the GPU in `GPUS`, None where it is not there."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    return next((key for key in GPUS if key in name), None)


def _mfu(flops: float, seconds: float) -> float | None:
    """Return the share of the device's dense bf16 peak; None where the peak is unknown."""
    name = _gpu_name()
    return None if name is None else flops / seconds / GPUS[name].peak_flops


def measure_loader(config: TrainConfig, num_images: int, rounds: int) -> dict[str, Any]:
    """Measure how fast one worker decodes the images of a row and puts it together."""
    row, collation = make_row(config, num_images), Collation.from_config(config.model, config.data)
    torch.set_num_threads(1)
    taken = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        collate([row], collation, ImageShare())
        taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken[1:])
    return {"photo": [*_PHOTO], "num_images": num_images, "row_ms": 1e3 * seconds, "rows_per_second": 1 / seconds}


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(distributed_backend(DEVICE), store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        stop_distributed()


def read_config(arguments: argparse.Namespace) -> tuple[TrainConfig, int]:
    """Return the settings of one rank with a part of the decoder, and how many layers the whole one has."""
    config = load_config(TrainConfig, arguments.config, arguments.set)
    full_layers = config.model.language.num_layers
    language = replace(config.model.language, num_layers=min(arguments.layers, full_layers))
    training = replace(config.training, global_batch_size=1, micro_batch_size=1, precision="bf16", fp8=arguments.fp8)
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
        sequence_parallel=False,
        overlap_p2p_comm=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    model = replace(config.model, language=language, backend=arguments.backend)
    checkpoint = replace(config.checkpoint, load_weights=None)
    run_dir = str(arguments.result.parent / "run")
    return replace(
        config, model=model, training=training, parallel=parallel, checkpoint=checkpoint, run_dir=run_dir
    ), full_layers


def main() -> int:
    """Do one section; exit status 78 where this machine cannot do it, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("layers", "loader"))
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--backend", choices=("torch", "transformer_engine"), default="torch")
    parser.add_argument("--fp8", choices=("hybrid", "e4m3"))
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings over CONFIG's")
    arguments = parser.parse_args()
    try:
        config, full_layers = read_config(arguments)
        check_requirements(config, num_gpus=torch.cuda.device_count() if DEVICE.type == "cuda" else 0, num_workers=1)
        if DEVICE.type == "cuda":
            check_capability(config, torch.cuda.get_device_capability())
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "layers": lambda: measure_layers(config, arguments.images, arguments.rounds, full_layers),
            "loader": lambda: measure_loader(config, arguments.images, arguments.rounds),
        }
        with _one_rank():
            arguments.result.write_text(json.dumps(measures[arguments.section]()))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
