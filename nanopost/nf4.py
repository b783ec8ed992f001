"""NF4: frozen matrices in 4 bits, with double quantisation (QLoRA, 2305.14314), as bitsandbytes has
them, bit for bit.

Each row of a matrix consists of blocks of 64. An entry is the nearest of 16 quantiles of a normal
distribution, times the largest magnitude of its block, absmax. The absmax of all blocks, less their
mean, form blocks of 256 and are 8-bit numbers in turn ("dynamic" ones, 1511.04561), times the
largest magnitude of theirs. Together: 4.127 bits per entry. (bitsandbytes' kernel for CPUs looks
8-bit numbers up in a table, and takes a neighbour of the nearest for one in some hundreds; this is
the nearest, as in its other kernels.)

A layer is dequantised when it is computed, in the forward and again in the backward pass, so there
is never more than one dense matrix at a time.

Shapes: N tokens, I inputs and O outputs of a layer, E = O I entries, B blocks of 64, C of 256.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanopost import InputError

BLOCK, NESTED_BLOCK = 64, 256
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Packed(NamedTuple):
    """A matrix in NF4."""

    codes: torch.Tensor  # uint8 [E / 2]: two entries per byte, the first in its upper half
    absmax: torch.Tensor  # uint8 [B]
    nested: torch.Tensor  # int32 [C + 1], bits of fp32: absmax of the absmax; last, their mean


def codebook(device=None) -> torch.Tensor:
    """The 16 values: fp32, ascending."""
    return torch.tensor(CODES, dtype=torch.float32, device=device)


def dynamic_map(device=None) -> torch.Tensor:
    """The 256 values of an 8-bit number: fp32, ascending. Decades from 1e-6 to 1, in each of them
    as many values, evenly spaced, as the bits that its exponent leaves can count."""
    values = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32)
        middles = (10.0 ** (bits - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize(weight_OI: torch.Tensor) -> Packed:
    """I: a multiple of 64."""
    device = weight_OI.device
    code_E, absmax_B = _nearest(weight_OI.flatten().float(), BLOCK, codebook(device))
    mean = absmax_B.mean()
    absmax, nested_C = _nearest(absmax_B - mean, NESTED_BLOCK, dynamic_map(device))
    nested = torch.cat([nested_C, mean[None]])
    return Packed((code_E[0::2] << 4) | code_E[1::2], absmax, nested.view(torch.int32))


def _nearest(x, block, codes):
    """-> (index of the code nearest to each x / absmax of its block, absmax of each block)."""
    padded = F.pad(x, (0, -len(x) % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    scaled = (padded * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    middles = (codes[:-1] + codes[1:]) / 2
    nearest = torch.bucketize(scaled.flatten()[: len(x)], middles, out_int32=True)
    return nearest.to(torch.uint8), absmax


def dequantize(packed: Packed, width: int, dtype: torch.dtype) -> torch.Tensor:
    """-> [O, I]. width: I. dtype: that of the matrix before."""
    codes, absmax, nested = packed
    device = codes.device
    nested_C, mean = nested.view(torch.float32).split([len(nested) - 1, 1])
    nested_B = nested_C.repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    absmax_B = dynamic_map(device)[absmax.int()] * nested_B + mean
    pairs = torch.cartesian_prod(codebook(device), codebook(device))  # of each byte
    entries = F.embedding(codes.int(), pairs).view(-1, BLOCK)
    return entries.mul_(absmax_B[:, None]).to(dtype).view(-1, width)


class _Linear(torch.autograd.Function):
    """x W^T + b, which saves W packed; b is frozen too."""

    @staticmethod
    def forward(ctx, x_NI, codes, absmax, nested, dtype, bias):
        ctx.save_for_backward(codes, absmax, nested)
        ctx.width, ctx.dtype = x_NI.shape[1], dtype
        weight_OI = dequantize(Packed(codes, absmax, nested), ctx.width, dtype)
        return F.linear(x_NI, weight_OI.to(x_NI.dtype), bias)

    @staticmethod
    def backward(ctx, d_NO):
        weight_OI = dequantize(Packed(*ctx.saved_tensors), ctx.width, ctx.dtype)
        return d_NO @ weight_OI.to(d_NO.dtype), None, None, None, None, None


# ------------------------------------------------------------------------------------------- layers
PARTS = ("weight", "weight_absmax", "weight_nested")  # the parameters of a packed layer


class FrozenLinear(nn.Linear):
    """A linear layer whose weight does not train: dense, or, after `pack`, in NF4."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x_NI):
        if not is_packed(self):
            return F.linear(x_NI, self.weight, self.bias)
        parts = (getattr(self, part) for part in PARTS)
        return _Linear.apply(x_NI, *parts, self.stored_dtype, self.bias)


def is_packed(module: nn.Module) -> bool:
    return hasattr(module, "weight_absmax")


def is_scale(name: str) -> bool:
    """Whether a parameter is one of those that a packed weight has beside it."""
    return name.endswith((".weight_absmax", ".weight_nested"))


def pack(layer: FrozenLinear, name: str, dtype: torch.dtype):
    """Give a layer on the meta device packed parameters in the place of its weight; hf.load_weights
    fills them. dtype: that of the weight in its folder, to which a dequantised one is rounded.
    InputError for a width of no whole blocks.

    They are integers, which FSDP2 gathers without casting them.
    """
    if layer.in_features % BLOCK:
        raise InputError(
            f"--quantize nf4: {name} is {layer.in_features} wide, which is no multiple of {BLOCK}: "
            "train this model without it."
        )
    entries = layer.weight.numel()
    blocks = -(-entries // BLOCK)
    sizes = entries // 2, blocks, -(-blocks // NESTED_BLOCK) + 1
    kinds = torch.uint8, torch.uint8, torch.int32
    for part, size, kind in zip(PARTS, sizes, kinds):
        empty = torch.empty(size, dtype=kind, device="meta")
        setattr(layer, part, nn.Parameter(empty, requires_grad=False))
    layer.stored_dtype = dtype
