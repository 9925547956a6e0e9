"""The record of an iteration, as it appears in the log, metrics.jsonl and curves."""

from typing import Any

import torch

from megatron_vlm.costs.flops import Work, step_flops
from megatron_vlm.platform.gpus import GPUS
from megatron_vlm.training.state import TrainState
from megatron_vlm.training.step import StepMetrics

_NO_CURVE = ("iteration", "unix_time")


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
    images = metrics.images_of_ranks
    record: dict[str, Any] = {
        "iteration": state.iteration,
        "stage": state.config.stage,
        "loss": metrics.loss,
        "loss_hex": None if metrics.loss is None else metrics.loss.hex(),
        "grad_norm": metrics.grad_norm,
        "grad_norm_hex": metrics.grad_norm.hex(),
        "learning_rate": metrics.lr,
        "consumed_samples": state.consumed_samples,
        "sample_ids_sha": metrics.sample_ids_sha,
        "tokens": metrics.num_tokens,
        "labels": metrics.num_labels,
        "images": metrics.num_images,
        "padding": 1.0 - metrics.num_tokens / max(1, metrics.num_positions),
        "image_imbalance": max(images) * len(images) / sum(images) if any(images) else None,
        "unix_time": metrics.ended_at,
        "seconds": metrics.seconds,
        **{f"seconds/{phase.value}": seconds for phase, seconds in metrics.phase_seconds.items()},
        "tokens_per_s": metrics.num_tokens / metrics.seconds,
        "data_wait": metrics.data_wait,
        "data_wait_fraction": metrics.data_wait / metrics.seconds,
        "flops": flops,
        "tflops_per_rank": flops_per_rank / 1e12,
        "mfu": flops_per_rank / peak if peak else None,
        "goodput": None if state.goodput is None else state.goodput.until(metrics.ended_at),
    }
    record.update({f"loss/{name}": value for name, value in metrics.dataset_losses.items()})
    for name, tokens in zip(state.dataset_names, metrics.dataset_tokens, strict=True):
        # Parts of a split dataset have one name.
        record[f"tokens/{name}"] = record.get(f"tokens/{name}", 0) + tokens
    if state.seen is not None:
        record.update({f"seen_tokens/{name}": tokens for name, tokens in state.seen.tokens.items()})
        for name, size in state.dataset_sizes.items():
            record[f"passes/{name}"] = state.seen.samples[name] / size
    if state.bad_samples is not None:
        record.update({f"bad_samples/{name}": number for name, number in state.bad_samples.counts.items()})
    record.update(state.validation_losses)
    return record


def _device_peak() -> float | None:
    """Return the peak of this device [FLOP/s]; None if it is unknown, in which case no MFU is reported."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((gpu.peak_flops for key, gpu in GPUS.items() if key in name), None)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record that are shown as curves: all but its place in the run."""
    return {
        key: float(value) for key, value in record.items() if isinstance(value, int | float) and key not in _NO_CURVE
    }
