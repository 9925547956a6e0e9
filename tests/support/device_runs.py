"""Small runs on one device, whose numbers tests compare between the CPU, a GPU, precisions and layers.

A process either sees a GPU or serves megatron-core's CUDA calls from the CPU, for its whole life, and a run on a GPU
may need an environment of its own. So each run is a process, but on a machine without a GPU, where all are alike.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.checkpoint.save import save_checkpoint
from megatron_vlm.config import CheckpointConfig, TrainConfig
from megatron_vlm.data.loading.collate import Collation, collate
from megatron_vlm.parallel.groups import stop_distributed
from megatron_vlm.parallel.slicing import ImageShare
from megatron_vlm.platform.device import distributed_backend, set_deterministic
from megatron_vlm.platform.launch.environment import library_environment
from megatron_vlm.training.objective import run_model
from megatron_vlm.training.step import train_step, update_weights
from tests.support.configs import tiny_model, tiny_run
from tests.support.host_reads import HostReads
from tests.support.jobs import FixedPlan, batches_of, start
from tests.support.release import release_models
from tests.support.samples import make_samples

ROWS_PER_STEP = 2
_SECONDS = 300
_START = (
    "from megatron_vlm.platform.device import prepare_process; prepare_process(); "
    "from tests.support.device_runs import main; main()"
)
# transformer-engine joins a norm and the projection behind it.
_JOINED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True, kw_only=True)
class DeviceRun:
    """Settings of a run."""

    device: str
    """cpu or cuda."""
    folder: str
    """The run folder; checkpoints go on from what is there."""
    backend: str = "torch"
    precision: str = "fp32"
    fp8: bool = False
    deterministic: bool = False
    start_from: str | None = None
    """Folder of another run, with the weights to start from."""
    train_iters: int = 4

    def config(self) -> TrainConfig:
        """Return the run's settings."""
        training = {
            "global_batch_size": ROWS_PER_STEP,
            "train_iters": self.train_iters,
            "precision": self.precision,
            "fp8": "hybrid" if self.fp8 else None,
            "deterministic": self.deterministic,
        }
        config = tiny_run(self.folder, training=training, model=replace(tiny_model(), backend=self.backend))
        return replace(config, checkpoint=CheckpointConfig(load_weights=self.start_from))


def measure(run: DeviceRun, work: Callable[..., Any], **arguments: Any) -> Any:
    """Return what `work(run, device, **arguments)` measures, a function of this module."""
    if run.device == "cpu" and not torch.cuda.is_available():
        return _measure_here(run, work, arguments)
    return measure_apart(run, work, **arguments)


def measure_apart(run: DeviceRun, work: Callable[..., Any], **arguments: Any) -> Any:
    """Return what `work` measures in a process that sees a GPU only if the run is on one."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job", Path(folder) / "result"
        job.write_bytes(pickle.dumps((run, work.__name__, arguments)))
        command = [sys.executable, "-c", _START, str(job), str(result)]
        environment = os.environ | library_environment(os.environ, run.config().training)
        if run.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(command, env=environment, timeout=_SECONDS, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{work.__name__} of {run} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return pickle.loads(result.read_bytes())


def _measure_here(run: DeviceRun, work: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    device = torch.device("cuda", torch.cuda.current_device()) if run.device == "cuda" else torch.device("cpu")
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    set_deterministic(run.deterministic)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(distributed_backend(device), store=store, rank=0, world_size=1)
    try:
        return work(run, device, **arguments)
    finally:
        stop_distributed()
        release_models()
        set_deterministic(was_deterministic)


def save_weights(run: DeviceRun, device: torch.device) -> None:
    """Save random weights in the run's folder."""
    state = start(run.config())
    save_checkpoint(run.config(), state.chunks, state.optimizer, state.progress())


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Numbers of a forward and a backward pass over one packed row."""

    losses: torch.Tensor
    """float32[k], of each label."""
    losses_alone: torch.Tensor
    """The same, every sample as a row of its own."""
    gradients: dict[str, torch.Tensor]
    """float32, by the parameter's name in the torch backend's layers joined as transformer-engine's are."""


def forward_and_backward(run: DeviceRun, device: torch.device) -> Pass:
    """Compute losses and gradients of a row of samples, and the losses of the samples alone."""
    state = start(run.config())
    collation = Collation.from_config(state.config.model, state.config.data)
    samples = make_samples(5, max_images=2)

    def losses(samples: list[Any]) -> torch.Tensor:
        return run_model(state.wrapped[0], collate([samples], collation, ImageShare()).to(device)).flatten().float()

    with torch.no_grad():
        alone = torch.cat([losses([sample]) for sample in samples]).cpu()
    state.wrapped[0].zero_grad_buffer()
    together = losses(samples)
    together.sum().backward()
    gradients = {_joined(name): p.main_grad.float().cpu() for name, p in state.chunks[0].named_parameters()}
    return Pass(losses=together.detach().cpu(), losses_alone=alone, gradients=gradients)


def _joined(name: str) -> str:
    for apart, joined in _JOINED.items():
        name = name.replace(apart, joined)
    return name


def train(run: DeviceRun, device: torch.device, *, num_steps: int, save: bool = False) -> list[tuple[str, str]]:
    """Do steps, from the run's checkpoint on if it has one; return loss and gradient norm of each, exactly."""
    config = run.config()
    samples, rows = _rows(config)
    state = start(config, FixedPlan.of(config, rows))
    loader = batches_of(config, state.rank, rows, samples, state.iteration)
    steps = []
    for _ in range(num_steps):
        metrics = train_step(state, [loader], device=device, stop_requested=False)
        state.iteration += 1
        state.consumed_samples += ROWS_PER_STEP
        steps.append((metrics.loss.hex(), metrics.grad_norm.hex()))
    if save:
        save_checkpoint(config, state.chunks, state.optimizer, state.progress())
    return steps


def _rows(config: TrainConfig) -> tuple[list[Any], list[list[int]]]:
    """Return samples and the rows of all steps, three samples each; none of them is longer than a third of a row."""
    num_rows = config.training.train_iters * ROWS_PER_STEP
    return make_samples(3 * num_rows, max_images=2), [[3 * row, 3 * row + 1, 3 * row + 2] for row in range(num_rows)]


def count_waits(run: DeviceRun, device: torch.device) -> int:
    """Return how often the host waits for a GPU in a step; on the CPU, how often it reads a value of a tensor."""
    config = run.config()
    samples, rows = _rows(config)
    state = start(config, FixedPlan.of(config, rows))
    loader = batches_of(config, state.rank, rows, samples, 0)
    update_weights(state, [loader], device=device, stop_requested=False)  # the first step makes tables and buffers
    ready = iter([next(loader).to(device) for _ in range(ROWS_PER_STEP)])
    with _waits(device) as count:
        update_weights(state, [ready], device=device, stop_requested=False)
        return count()


@contextlib.contextmanager
def _waits(device: torch.device) -> Iterator[Callable[[], int]]:
    if device.type == "cpu":
        with HostReads() as reads:
            yield lambda: reads.count
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    """Do the run that the first argument names, and write what it measures into the second."""
    job, result = map(Path, sys.argv[1:])
    run, work, arguments = pickle.loads(job.read_bytes())
    result.write_bytes(pickle.dumps(_measure_here(run, globals()[work], arguments)))
