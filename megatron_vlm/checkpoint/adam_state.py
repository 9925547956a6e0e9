"""State inside Adam, whichever it is: torch's AdamW, or the FusedAdam of transformer-engine or apex.

Each keeps `exp_avg` and `exp_avg_sq` per parameter. torch keeps the step count as one tensor per parameter; a FusedAdam
keeps one number per parameter group and takes any other entry of a parameter for a state that it must look up.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def inner_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers inside a chained one, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return the Adams of this rank; none if its stage trains no parameter."""
    found = [getattr(inner, "optimizer", None) for inner in inner_optimizers(optimizer)]
    return [adam for adam in found if adam is not None]


def create_state(adam: torch.optim.Optimizer) -> None:
    """Give every parameter without state that of an Adam that has not taken a step yet."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if state:
                continue
            if counts_per_parameter(adam):
                on_device = group.get("fused") or group.get("capturable")
                device = parameter.device if on_device else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter.detach())


def counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """Return whether this Adam keeps a step count for every parameter."""
    return isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))


def step_count(optimizer: MegatronOptimizer) -> int:
    """Return the steps that this rank's Adams have taken; 0 if it trains no parameter.

    Raises:
        RuntimeError: the counts differ.
    """
    counts = {count for adam in adams(optimizer) for count in _step_counts(adam)}
    if len(counts) > 1:
        raise RuntimeError(f"parameters have taken different numbers of optimizer steps: {sorted(counts)}")
    return counts.pop() if counts else 0


def _step_counts(adam: torch.optim.Optimizer) -> set[int]:
    if counts_per_parameter(adam):
        # One copy from the device for all of them.
        steps = [state["step"].detach().reshape(()) for state in adam.state.values()]
        return {int(step) for step in set(torch.stack(steps).tolist())} if steps else set()
    # A group without parameters on this rank does not count.
    return {int(group.get("step", 0)) for group in adam.param_groups if group["params"]}


@torch.no_grad()
def set_step_count(optimizer: MegatronOptimizer, step: int) -> None:
    """Let every Adam of this rank go on after `step` steps; each has its state already."""
    for adam in adams(optimizer):
        if counts_per_parameter(adam):
            for state in adam.state.values():
                state["step"].fill_(step)
        else:
            for group in adam.param_groups:
                group["step"] = step


def values_of(adam: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter of Adam and its moments by name, each flattened; writing to them changes the optimizer."""
    state = adam.state[parameter]
    named = {"param": parameter, **{name: state[name] for name in MOMENTS}}
    return {name: values.detach().view(-1) for name, values in named.items()}
