"""Parameter groups, the learning rate as a function of the step, and a word on no progress."""

from torch import nn
from torch.optim import AdamW, Optimizer

from nanopost import dist


def adamw(model: nn.Module, weight_decay: float, **rates: float) -> AdamW:
    """AdamW (1711.05101) of what requires a gradient now. It decays matrices and leaves norms and
    biases alone.

    rates: value=5.0 trains the part of the model with that name at five times the rate.
    """
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
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
        fused=not dist.reproducible,  # its last digits depend on where a shard begins
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


# What Standstill says in the training scripts.
NO_GRADIENT = (
    "warning: nothing is learnt. The gradient was 0 in each step so far: check --data, and whether "
    "the flags of the loss let it saturate."
)
EQUAL_REWARDS = (
    "warning: nothing is learnt. In each step so far the rewards that it compares were equal, or "
    "none applied: look at samples.jsonl, then check --reward and --data, warm up with "
    "train_sft.py, or raise --max_new_tokens."
)


class Standstill:
    """Says, once, that none of a run's first steps has taught it anything."""

    def __init__(self, steps: int, watched: int = 5):
        """steps: of the run. watched: how many of them to watch."""
        self.left = min(steps, watched)

    def hint(self, idle: bool, sentence: str) -> str:
        """idle: this step has taught nothing -> the sentence, at the last step watched and if all
        of them were idle, else ""."""
        self.left -= 1
        if not idle:
            self.left = -1  # it moves: nothing to say any more
        return sentence if self.left == 0 else ""
