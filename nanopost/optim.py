"""Parameter groups and the learning rate as a function of the step."""

import math

from torch import nn
from torch.optim import AdamW


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], **rates: float
) -> AdamW:
    """AdamW (1711.05101) that decays matrices and leaves norms and biases alone; the rate is set at each step.

    rates: value=5.0: the part of the model with that name learns at five times that rate.
    """
    groups = {}
    for name, p in model.named_parameters():
        part = next((part for part in rates if name.startswith(part + ".")), None)
        groups.setdefault((part, p.ndim < 2), []).append(p)
    return AdamW(
        [
            {
                "params": params,
                "weight_decay": 0.0 if vector else weight_decay,
                "rate": rates.get(part, 1.0),
            }
            for (part, vector), params in groups.items()
        ],
        lr=0.0,
        betas=betas,
        fused=True,
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of step 1..steps: linear from 0 to the peak over `warmup` steps, at most half of them, then constant,
    linear or cosine.

    A pure function of the step, so a resumed run needs no scheduler state. linear and cosine end one step above 0.
    """
    warmup = min(warmup, steps // 2)  # a short run, too, reaches its rate
    if step <= warmup:
        return peak * step / warmup
    left = (steps - step + 1) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return peak * shape[schedule]


def set_learning_rate(optimizer: AdamW, rate: float):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
