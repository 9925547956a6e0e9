"""A stand-in for transformer-engine's FusedAdam: one step count per group, and states that it knows by name only."""

import torch

NAMES = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


class FusedAdam(torch.optim.Optimizer):
    """Keeps its state as FusedAdam does; the update is written out."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        assert adam_w_mode

    def state_dict(self):
        saved = super().state_dict()
        for entry in saved["state"].values():
            for name, values in entry.items():
                assert values.dtype == NAMES[name]
        return saved

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter, group):
        entry = self.state[parameter]
        if not entry:
            entry.update({name: torch.zeros_like(parameter) for name in NAMES})
        (beta1, beta2), step = group["betas"], group["step"]
        entry["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        entry["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = (entry["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(entry["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))
