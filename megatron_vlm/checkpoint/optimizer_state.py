"""State of torch's AdamW inside megatron-core's optimizers, to and from a checkpoint.

megatron-core 0.16 assumes the Adam of transformer-engine or apex, which keeps one step count per group. torch's AdamW
keeps one tensor per parameter. The functions here bridge the difference through public calls.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

SHARDING_METADATA = {
    # The state is stored per tensor, so it can be loaded at any data-, tensor- and pipeline-parallel size.
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def inner_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers inside a chained one, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def has_parameters(optimizer: MegatronOptimizer) -> bool:
    """Return whether this rank trains any parameter."""
    adams = (getattr(inner, "optimizer", None) for inner in inner_optimizers(optimizer))
    return any(group["params"] for adam in adams if adam is not None for group in adam.param_groups)


def create_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state of an Adam that has not taken a step yet.

    A distributed optimizer cannot describe a state that does not exist, which loading needs, and its own way of
    creating one would apply weight decay.
    """
    for inner in inner_optimizers(optimizer):
        if getattr(inner, "optimizer", None) is None:
            continue
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                state = inner.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, state_dict: Any, distributed: bool) -> None:
    """Load the state that the checkpoint returned for `optimizer.sharded_state_dict`.

    Args:
        optimizer: after `create_state`.
        state_dict: one state, or one per chained optimizer under its index.
        distributed: whether this is the distributed optimizer.
    """
    inner = inner_optimizers(optimizer)
    states = [state_dict] if len(inner) == 1 else [state_dict[index] for index in range(len(inner))]
    for one, state in zip(inner, states, strict=True):
        if getattr(one, "optimizer", None) is None:
            continue
        if distributed:
            _load_distributed(one, state)
        else:
            one.load_state_dict(state)
        _separate_steps(one.optimizer)


def _load_distributed(inner: Any, state: dict[str, Any]) -> None:
    state = dict(state)
    state.pop("param_state_sharding_type")
    param_state = state.pop("param_state")
    inner.load_state_dict(state)
    # The loader iterates over every entry of a parameter's state and does not know "step".
    steps = {parameter: entry.pop("step") for parameter, entry in inner.optimizer.state.items()}
    inner.load_parameter_state_from_fully_reshardable(param_state)
    for parameter, step in steps.items():
        inner.optimizer.state[parameter]["step"] = step


def _separate_steps(adam: torch.optim.Optimizer) -> None:
    """Give every parameter its own step count: loading makes all of them share and advance a single tensor."""
    for state in adam.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
