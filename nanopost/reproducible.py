"""Sums that do not depend on the order of their terms, for a run that does not depend on its ranks.

With --reproducible, the weights and metrics of a run are the same bytes on any number of ranks:

micro-batches  are cut from what all ranks hold, without a look at their number (forward.py)
samples        are drawn, rewarded and evaluated in chunks of packing.CHUNK prompts
gradients      are added over micro-batches and ranks in fixed point, which is exact: FixedPoint
the norm       of the gradient is added up in integers: sum_of_squares
metrics        and statistics over ranks are exact, then rounded once, with or without the flag

It holds between runs that agree in their flags, type of machine, version of torch and threads per
rank (OMP_NUM_THREADS; run.json has them), on CPUs in fp32; CUDA is set to be deterministic, but
not tested. Rewards of one's own must not read a clock, the rank, or what other calls left behind.
"""

import math
from fractions import Fraction

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

# A step of 2^-44 is 6e-14: AdamW divides by the root of its second moment plus 1e-8, next to which
# what is lost in rounding is nothing. An int64 then holds sums below 2^19.
STEPS = 2.0**44
LARGEST = 2.0**18


# -------------------------------------------------------------------------------------- exact sums
def exact(x: torch.Tensor | Fraction | float) -> Fraction | float:
    """A number, or the sum of all numbers of a tensor, without any rounding; inf or NaN as a float.

    Each is an integer of 53 bits times a power of two: the integers are added for each power.
    """
    if not isinstance(x, torch.Tensor) or x.numel() == 1:
        x = x.item() if isinstance(x, torch.Tensor) else x
        x = x if isinstance(x, (int, Fraction)) else float(x)
        return Fraction(x) if math.isfinite(x) else x
    x = x.detach().double().flatten()
    if not x.isfinite().all():
        return float(x.sum())
    mantissa, exponent = torch.frexp(x)
    whole = (mantissa * 2**53).long()
    lowest = -1100  # a float64 has exponents from -1073 to 1024
    place = (exponent - lowest).long()
    high = torch.zeros(2200, dtype=torch.long, device=x.device)
    low = torch.zeros_like(high)
    high.index_add_(0, place, whole >> 27)
    low.index_add_(0, place, whole & (2**27 - 1))
    total = 0
    for p in (high | low).nonzero()[:, 0].tolist():
        total += ((int(high[p]) << 27) + int(low[p])) << p
    return Fraction(total) * Fraction(2) ** (lowest - 53)


def rounded(x: Fraction | float) -> float:
    """The float64 nearest to an exact sum."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def row_sums(x_BT: torch.Tensor) -> torch.Tensor:
    """The sum of each row -> float64 x_B, the same whatever the number of zeros at its end."""
    return torch.tensor([math.fsum(row) for row in x_BT.tolist()], dtype=torch.float64)


def sum_of_squares(x: torch.Tensor, exponent: int) -> int:
    """In units of 2^(2 exponent - 72), rounded down; exponent: all of x is below 2^exponent.

    The squares are cut into three integers of 24 bits, whose sums a float64 holds exactly.
    """
    left = torch.ldexp(x.double(), torch.tensor(-exponent, device=x.device)).square()
    total = 0
    for _ in range(3):
        left = left * 2**24
        whole = left.floor()
        total = (total << 24) + int(whole.sum())
        left -= whole
    return total


# --------------------------------------------------------------------------------------- gradients
def fixed(x: torch.Tensor) -> torch.Tensor:
    """Numbers below LARGEST -> int64, in steps of 1 / STEPS."""
    return (x.double() * STEPS).round().long()


class FixedPoint(ReduceScatter):
    """FSDP2's reduce-scatter of a module, exact over micro-batches and ranks: what it hands out is
    the total of the step so far, so the gradient is dropped before each micro-batch."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.total = None  # int64, of this rank's shard
        self.largest = 0.0  # no number on this rank has added more

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.largest = self.largest + input_tensor.abs().max()
        shard = torch.empty(output_tensor.numel(), dtype=torch.long, device=input_tensor.device)
        dist.reduce_scatter_tensor(shard, fixed(input_tensor), group=group)
        self._add(shard, output_tensor)

    def add(self, gradient: torch.Tensor):
        """The same for a process alone, where FSDP2 reduces nothing: in place."""
        if gradient.numel():
            self.largest = self.largest + gradient.abs().max()
        self._add(fixed(gradient), gradient)

    def _add(self, term, out):
        if self.total is not None:
            term += self.total
        self.total = term
        out.copy_(term.double() / STEPS)


class OrderFree:
    """The gradient of a model, from micro-batch to micro-batch of an optimizer step."""

    def __init__(self, model, sharded: list):
        """sharded: the modules whose gradients FSDP2 reduces over ranks; none for one process."""
        self.model = model
        self.sums = {}  # module or, in a process alone, parameter -> FixedPoint
        for module in sharded:
            self.sums[module] = FixedPoint()
            module.set_custom_reduce_scatter(self.sums[module])
        self.alone = not sharded

    def before_pass(self):
        for p in self.model.parameters():
            p.grad = None  # what comes next is the total

    def after_pass(self):
        if self.alone:
            for p, gradient in self.gradients():
                self.sums.setdefault(p, FixedPoint()).add(gradient)

    def gradients(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """The parameters that have a gradient, and this rank's shards of these."""
        found = []
        for p in self.model.parameters():
            if p.grad is not None:
                found.append((p, p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad))
        return found

    def finish(self) -> float:
        """The end of an optimizer step -> no number on this rank has added more to a gradient."""
        largest = [float(x.largest) for x in self.sums.values()]
        for x in self.sums.values():
            x.clear()
        if any(map(math.isnan, largest)):  # which max would pass over
            return math.nan
        return max(largest, default=0.0)
