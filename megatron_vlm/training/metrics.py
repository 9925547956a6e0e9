"""What a run writes about each iteration: the log line, metrics.jsonl and TensorBoard."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.costs.flops import Work, step_flops
from megatron_vlm.platform.files.durable import write_durably
from megatron_vlm.platform.files.run_folder import METRICS_NAME
from megatron_vlm.platform.machine import PEAK_FLOPS
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

logger = logging.getLogger(__name__)


def metrics_record(state: TrainState, metrics: StepMetrics) -> dict[str, Any]:
    """Return one line of metrics.jsonl; `loss_hex` and `grad_norm_hex` are exact."""
    training = state.config.training
    work = Work(
        num_tokens=metrics.num_tokens,
        attention_pairs=metrics.attention_pairs,
        num_labels=metrics.num_labels,
        num_images=metrics.num_images,
    )
    flops = step_flops(state.config.model, training.freeze, work).total
    flops_per_rank = flops / metrics.seconds / state.layout.world_size
    peak = _device_peak()
    record: dict[str, Any] = {
        "iteration": state.iteration,
        "stage": state.config.stage,
        "loss": metrics.loss,
        "loss_hex": metrics.loss.hex(),
        "grad_norm": metrics.grad_norm,
        "grad_norm_hex": metrics.grad_norm.hex(),
        "learning_rate": metrics.lr,
        "consumed_samples": state.consumed_samples,
        "sample_ids_sha": metrics.sample_ids_sha,
        "tokens": metrics.num_tokens,
        "labels": metrics.num_labels,
        "images": metrics.num_images,
        "padding": 1.0 - metrics.num_tokens / max(1, metrics.num_positions),
        "seconds": metrics.seconds,
        "tokens_per_s": metrics.num_tokens / metrics.seconds,
        "data_wait": metrics.data_wait,
        "flops": flops,
        "tflops_per_rank": flops_per_rank / 1e12,
        "mfu": flops_per_rank / peak if peak else None,
    }
    for name, value in zip(state.dataset_names, metrics.dataset_losses, strict=True):
        if not math.isnan(value):
            record[f"loss/{name}"] = value
    return record


def _device_peak() -> float | None:
    """Return the peak of this device [FLOP/s]; None where it is not known, and no MFU is reported."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def log_line(record: dict[str, Any], train_iters: int) -> str:
    """Return the line for people, in Megatron-LM's form."""
    parts = [
        f"iteration {record['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {record['consumed_samples']:10d}",
        f"elapsed time per iteration (ms): {record['seconds'] * 1e3:.1f}",
        f"tokens per second: {record['tokens_per_s']:.0f}",
        f"learning rate: {record['learning_rate']:.4E}",
        f"lm loss: {record['loss']:.6E}",
        f"grad norm: {record['grad_norm']:.3f}",
        f"padding: {record['padding']:.3f}",
        *(f"{key}: {value:.4f}" for key, value in record.items() if key.startswith("loss/")),
    ]
    return " | ".join(parts) + " |"


class MetricsWriter:
    """Writes metrics.jsonl and TensorBoard files of a run; lines after the resumed iteration are replaced."""

    def __init__(self, run_dir: str | Path, resumed_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = Path(run_dir) / METRICS_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(path, resumed_iteration)
        self._stream = path.open("a")
        self._tensorboard = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resumed_iteration + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is on disk when the call returns, as far as the process dying goes."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        for key, value in record.items():
            if isinstance(value, float) and key != "iteration":
                self._tensorboard.add_scalar(key, value, record["iteration"])

    def close(self) -> None:
        """Flush and close both."""
        self._stream.close()
        self._tensorboard.close()


def _drop_after(path: Path, iteration: int) -> None:
    """Keep the whole lines up to an iteration; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["iteration"] <= iteration:
            kept.append(line + "\n")
    write_durably(path, "".join(kept).encode())
