"""Parameter groups, and the learning rate as a function of the step."""

from torch import nn
from torch.optim import AdamW, Optimizer


def adamw(model: nn.Module, weight_decay: float, **rates: float) -> AdamW:
    """AdamW (1711.05101) that decays matrices and leaves norms and biases alone.

    rates: value=5.0 trains the part of the model with that name at five times the rate.
    """
    groups = {}
    for name, p in model.named_parameters():
        part = next((part for part in rates if name.startswith(part + ".")), None)
        groups.setdefault((part, p.ndim < 2), []).append(p)
    return AdamW(
        [
            {
                "params": params,
                "weight_decay": 0.0 if is_vector else weight_decay,
                "rate": rates.get(part, 1.0),
            }
            for (part, is_vector), params in groups.items()
        ],
        lr=0.0,
        betas=(0.9, 0.95),
        fused=True,
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of step 1..steps: linear from 0 to the peak over `warmup` steps, then linear to 0.

    A pure function of the step, so a resumed run needs no scheduler state. Warm-up takes at most
    half a run, so that a short one reaches its peak too; the last step's rate is not yet 0.
    """
    warmup = min(warmup, steps // 2)
    if step <= warmup:
        return peak * step / warmup
    return peak * ((steps - step + 1) / max(1, steps - warmup))


def set_learning_rate(optimizer: Optimizer, rate: float):
    """Set the rate of every group, multiplied by the group's "rate" if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)
