"""What a configuration needs of the machine, checked before any rank starts."""

import importlib.util

from megatron_vlm.config import ConfigError, TrainConfig


def check_requirements(config: TrainConfig, *, num_gpus: int, num_workers: int) -> None:
    """Check that this node can do what the settings ask for.

    Args:
        config: the settings of the run.
        num_gpus: GPUs that the ranks of this node see.
        num_workers: ranks that this node starts.

    Raises:
        ConfigError: FP8 or transformer-engine without the library or a GPU; more ranks than GPUs.
    """
    if config.training.fp8 is not None:
        # megatron-core computes in full precision without a word where the library is missing.
        _check_transformer_engine(f"training.fp8={config.training.fp8}", "remove training.fp8", num_gpus)
    if config.model.backend == "transformer_engine":
        _check_transformer_engine("model.backend=transformer_engine", "set model.backend=auto", num_gpus)
    if num_gpus and num_workers > num_gpus:
        raise ConfigError(
            f"{num_workers} ranks on a node with {num_gpus} visible GPUs",
            fix=f"use --nproc-per-node {num_gpus}, or CUDA_VISIBLE_DEVICES= to run on the CPU",
        )


def _check_transformer_engine(setting: str, way_out: str, num_gpus: int) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"{setting} needs transformer-engine, which is not installed",
            fix=f"pip install 'megatron_vlm[gpu]' on a GPU machine, or {way_out}",
        )
    if not num_gpus:
        raise ConfigError(f"{setting} needs a GPU, and none is visible", fix=f"run it on a GPU machine, or {way_out}")
