"""Gradient buffers and AdamW around the model."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    ParamGroupOverride,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.checkpoint.adam_state import inner_optimizers
from megatron_vlm.config import PART_NAMES, TrainConfig
from megatron_vlm.config.patterns import matches, matches_any
from megatron_vlm.models.parameter_names import global_parameters
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.training.data_parallel import SingleDataParallel
from megatron_vlm.training.finish_gradients import finish_gradients


def wrap_model(config: TrainConfig, chunks: Sequence[VisionLanguageModel]) -> list[DistributedDataParallel]:
    """Give each chunk megatron-core's gradient buffers; freeze the parts that do not learn first."""
    parallel = config.parallel
    has_peers = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce and has_peers,
        overlap_param_gather=parallel.overlap_param_gather and has_peers,
        bucket_size=parallel.ddp_bucket_size,
        # `train_step` checks loss and gradient norm itself and names the iteration.
        check_for_nan_in_grad=False,
    )
    model_config = chunks[0].config
    modules = [Float16Module(model_config, chunk) if model_config.bf16 else chunk for chunk in chunks]
    wrapper = DistributedDataParallel if has_peers else SingleDataParallel
    wrapped = [
        wrapper(model_config, ddp_config, module, disable_bucketing=index > 0) for index, module in enumerate(modules)
    ]
    for chunk in wrapped:
        _accumulate_in_place(chunk)
    return wrapped


def _accumulate_in_place(chunk: torch.nn.Module) -> None:
    """Have transformer-engine's layers add weight gradients to the buffers in the matrix product itself.

    megatron-core's `gradient_accumulation_fusion` would set the same, but its own output layer then asks for apex.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            learning = [weight for weight in module.parameters(recurse=False) if weight.requires_grad]
            has_buffers = bool(learning) and all(hasattr(weight, "main_grad") for weight in learning)
            setattr(module, "fuse_wgrad_accumulation", has_buffers)  # noqa: B010


def build_optimizer(config: TrainConfig, wrapped: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """Build AdamW for all parameters that learn, in groups by learning rate and weight decay."""
    settings, parallel = config.optimizer, config.parallel
    model_config: TransformerConfig = wrapped[0].config
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
        ),
        list(wrapped),
        config_overrides=_overrides(config, wrapped),
        use_gloo_process_groups=False,
    )
    _use_fused_adam(optimizer)
    _connect_schedule(model_config, optimizer, wrapped)
    return optimizer


def _overrides(config: TrainConfig, wrapped: Sequence[DistributedDataParallel]) -> dict[ParamKey, ParamGroupOverride]:
    """Return the settings of each group of parameters that differ from those of the optimizer.

    megatron-core leaves it to its scheduler to apply `wd_mult`; here the rate is a function of the iteration and the
    decay is constant.
    """
    settings = config.optimizer
    of_tower = tuple(f"{PART_NAMES[0]}.{pattern}" for pattern in config.model.vision.no_weight_decay)
    no_decay = (*settings.no_weight_decay, *of_tower)
    members: dict[tuple[float, float], set[int]] = defaultdict(set)
    for chunk in wrapped:
        for name, parameter in global_parameters(_unwrap(chunk)):
            factors = [factor for pattern, factor in settings.lr_multipliers.items() if matches(pattern, name)]
            decays = parameter.dim() > 1 and not matches_any(no_decay, name)
            members[factors[-1] if factors else 1.0, float(decays)].add(id(parameter))
    return {
        ParamKey(predicate=ParamPredicate(f"lr_mult {lr} wd_mult {decay}", partial(_is_one_of, chosen))): {
            "lr_mult": lr,
            "wd_mult": decay,
            "weight_decay": settings.weight_decay * decay,
        }
        for (lr, decay), chosen in members.items()
    }


def _is_one_of(chosen: set[int], parameter: torch.nn.Parameter) -> bool:
    return id(parameter) in chosen


def _unwrap(module: Any) -> VisionLanguageModel:
    """Return the chunk inside megatron-core's wrappers."""
    return module if isinstance(module, VisionLanguageModel) else _unwrap(module.module)


def _use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """Make torch's AdamW, the fallback without transformer-engine, update each parameter in one pass."""
    for inner in inner_optimizers(optimizer):
        adam = getattr(inner, "optimizer", None)
        if isinstance(adam, torch.optim.AdamW):
            adam.defaults["fused"] = True
            for group in adam.param_groups:
                group["fused"], group["foreach"] = True, False


def _connect_schedule(
    model_config: TransformerConfig, optimizer: MegatronOptimizer, wrapped: Sequence[DistributedDataParallel]
) -> None:
    """Tell the pipeline schedules how gradients are scaled, reduced and finished."""
    model_config.finalize_model_grads_func = finish_gradients
    model_config.grad_scale_func = optimizer.scale_loss
    ddp_config = wrapped[0].ddp_config
    if ddp_config.overlap_grad_reduce:
        model_config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        model_config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if ddp_config.overlap_param_gather:
        model_config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])


def _one_or_all(functions: list) -> object:
    return functions[0] if len(functions) == 1 else functions


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
