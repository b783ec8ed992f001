"""Gated DeltaNet (2412.06464): attention in linear time, over a state instead of a cache of keys.

Each value head keeps a matrix S [K, V], which is 0 before a document's first token. A token fades
it, corrects what it says of the token's key, and reads it (equation 10, transposed):

    S <- a S,  S <- S + k (b (v - S^T k))^T,  o = S^T q      a = exp(decay), b = beta

Before that, q, k and v go through a short causal convolution along the document, with a SiLU.

Packed documents do not see each other: neither the state nor the convolution runs on from one
document into the next. Where documents share what they begin with (batch.Prefixes), the shared
tokens are computed once, and each document goes on from the state that its prefix left.

In training the recurrence is computed in chunks of tokens. Within a chunk it is a few products of
matrices, since the corrections of all its tokens solve one triangular system (2406.06484, section
3.2; with decay, 2412.06464, section 3.3). Chunks form a forest: each goes on from the state of its
parent. Those of equal depth are computed at once, whatever document they are of.

Shapes: U tokens that are computed, S documents, B rows of a cache, P prompts, X chunks, T tokens of
a chunk, G key heads, H value heads, K and V width of a key and of a value, C channels of the
convolution (q, k and v side by side), J tokens that it sees.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nanopost.attention import Packing, repeat
from nanopost.config import Config, DeltaSizes

LONGEST = 64  # tokens of a chunk


class DeltaNet(nn.Module):
    """The layer that stands where other blocks have attention. Names are the checkpoint's."""

    def __init__(self, c: Config):
        super().__init__()
        self.sizes = s = c.delta
        channels = 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim
        self.in_proj_qkv = nn.Linear(c.width, channels, bias=False)
        self.in_proj_z = nn.Linear(c.width, s.value_heads * s.value_dim, bias=False)
        self.in_proj_b = nn.Linear(c.width, s.value_heads, bias=False)
        self.in_proj_a = nn.Linear(c.width, s.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, s.kernel, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(s.value_heads))
        self.A_log = nn.Parameter(torch.zeros(s.value_heads))
        self.norm = GatedNorm(s.value_dim, c.norm_eps)
        self.out_proj = nn.Linear(s.value_heads * s.value_dim, c.width, bias=False)

    def forward(self, x_UD, recur):
        """recur(qkv_UC, decay_UH, beta_UH, weight_CJ, sizes) -> out_UHV: convolution and state."""
        z_UHV = self.in_proj_z(x_UD).unflatten(1, (-1, self.sizes.value_dim))
        beta_UH = self.in_proj_b(x_UD).sigmoid()
        precision = torch.promote_types(x_UD.dtype, torch.float32)
        step_UH = F.softplus(self.in_proj_a(x_UD).to(precision) + self.dt_bias)
        decay_UH = -self.A_log.to(precision).exp() * step_UH
        weight_CJ = self.conv1d.weight[:, 0]
        out_UHV = recur(self.in_proj_qkv(x_UD), decay_UH, beta_UH, weight_CJ, self.sizes)
        return self.out_proj(self.norm(out_UHV, z_UHV).flatten(1))


class GatedNorm(nn.Module):
    """x / rms(x) * weight * silu(z), over each head."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_UHV, z_UHV):
        precision = torch.promote_types(x_UHV.dtype, torch.float32)
        weight = self.weight.to(precision)
        normed_UHV = F.rms_norm(x_UHV.to(precision), weight.shape, weight, self.eps)
        return (normed_UHV * F.silu(z_UHV.to(precision))).to(x_UHV.dtype)


# ------------------------------------------------------------------------------------ packed tokens
class Level(NamedTuple):
    """Chunks of equal depth: rows first to end - 1 of all. parent_X: which of the chunks one level
    above each goes on from."""

    first: int
    end: int
    parent_X: torch.Tensor | None  # None: these begin documents


class Chunks(NamedTuple):
    """The tokens of packed documents in chunks, parents first."""

    index_XT: torch.Tensor  # int64: where each is among the U tokens; padded with the last one
    real_XT: torch.Tensor  # bool: it is not padding
    inverse_U: torch.Tensor  # int64: where each token is among the X T
    before_JU: torch.Tensor  # int64: the tokens before each, in its document; U where there is none
    levels: list[Level]
    last_S: torch.Tensor  # int64: the chunk that ends each document

    @classmethod
    def of(cls, packing: Packing, kernel: int) -> "Chunks":
        """kernel: tokens that the convolution sees, J."""
        cu_seqlens = packing.cu_seqlens.cpu().numpy().astype(np.int64)
        first_U = index_N = np.arange(cu_seqlens[-1])
        cu_own = cu_seqlens
        if packing.prefixes is not None:
            first_U = packing.prefixes.first_U.cpu().numpy()
            index_N = packing.prefixes.index_N.cpu().numpy()
            cu_own = packing.prefixes.cu_own.cpu().numpy().astype(np.int64)
        position_N = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        back_J1 = np.arange(1, kernel)[:, None]
        there_JU = position_N[first_U] >= back_J1
        before_JU = np.where(there_JU, index_N[np.maximum(first_U - back_J1, 0)], len(first_U))

        # A document begins a piece, and so does the token after one from which another document
        # goes on.
        parent_S = before_JU[0, cu_own[:-1]]
        branches = parent_S[parent_S < len(first_U)] + 1
        start_Y = np.unique(np.concatenate([cu_own[:-1], branches]))
        end_Y = np.append(start_Y[1:], len(first_U))
        size = int(min(LONGEST, -(-(end_Y - start_Y).max() // 16) * 16))
        starts, ends, parents, depths, chunk_of_end = [], [], [], [], {}
        for start, end in zip(start_Y.tolist(), end_Y.tolist()):
            for at in range(start, end, size):
                parent = chunk_of_end.get(int(before_JU[0, at]), -1)
                chunk_of_end[min(at + size, end) - 1] = len(starts)
                starts.append(at)
                ends.append(min(at + size, end))
                parents.append(parent)
                depths.append(depths[parent] + 1 if parent >= 0 else 0)

        order_X = np.argsort(depths, kind="stable")
        place_X = np.empty_like(order_X)
        place_X[order_X] = np.arange(len(order_X))
        start_X, end_X = np.array(starts)[order_X], np.array(ends)[order_X]
        index_XT = start_X[:, None] + np.arange(size)
        real_XT = index_XT < end_X[:, None]
        inverse_U = np.empty(len(first_U), np.int64)
        inverse_U[index_XT[real_XT]] = real_XT.flatten().nonzero()[0]
        counts = np.bincount(depths)
        first_of_level = counts.cumsum() - counts
        levels = []
        for depth, first in enumerate(first_of_level):
            parent_X = None
            if depth:
                above = np.array(parents)[order_X[first : first + counts[depth]]]
                parent_X = _on(packing, place_X[above] - first_of_level[depth - 1])
            levels.append(Level(int(first), int(first + counts[depth]), parent_X))
        last_S = place_X[[chunk_of_end[end - 1] for end in cu_own[1:].tolist()]]
        arrays = np.minimum(index_XT, end_X[:, None] - 1), real_XT, inverse_U, before_JU
        return cls(*(_on(packing, x) for x in arrays), levels, _on(packing, last_S))


def _on(packing, array):
    return torch.from_numpy(array).to(packing.cu_seqlens.device)


@torch.compiler.disable
def packed(qkv_UC, decay_UH, beta_UH, weight_CJ, sizes: DeltaSizes, chunks: Chunks):
    """-> out_UHV in the input's dtype, and the states after each level of chunks, fp32 or more."""
    q, k, v = split(convolved(qkv_UC, weight_CJ, chunks.before_JU), sizes)
    out_UHV, states = delta_rule(q, k, v, decay_UH, beta_UH, chunks)
    return out_UHV.to(qkv_UC.dtype), states


def convolved(qkv_UC, weight_CJ, before_JU):
    """silu of the causal convolution, each channel by itself -> fp32 or more [U, C]."""
    weight_CJ = weight_CJ.to(torch.promote_types(weight_CJ.dtype, torch.float32))
    padded = F.pad(qkv_UC, (0, 0, 0, 1))  # a row of zeros: what is before a document
    out_UC = qkv_UC * weight_CJ[:, -1]
    for j, before_U in enumerate(before_JU, 2):
        out_UC = out_UC + repeat(padded, before_U) * weight_CJ[:, -j]
    return F.silu(out_UC)


def split(mixed_UC, sizes: DeltaSizes):
    """-> q_UHK, k_UHK, v_UHV: queries and keys of length 1, queries divided by sqrt(K)."""
    keys = sizes.key_heads * sizes.key_dim
    q, k, v = mixed_UC.split([keys, keys, sizes.value_heads * sizes.value_dim], -1)
    q, k = (x.unflatten(1, (-1, sizes.key_dim)) for x in (q, k))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    each = sizes.value_heads // sizes.key_heads  # value heads of a key head
    q, k = (x.repeat_interleave(each, 1) for x in (q * sizes.key_dim**-0.5, k))
    return q, k, v.unflatten(1, (-1, sizes.value_dim))


def delta_rule(q_UHK, k_UHK, v_UHV, decay_UH, beta_UH, chunks: Chunks):
    """The gated delta rule in chunks -> out_UHV, and the states [X, H, K, V] after each level."""
    q, k, v = (_in_chunks(x, chunks) for x in (q_UHK, k_UHK, v_UHV))
    # Padding repeats a token: with a beta and a decay of 0 it changes nothing.
    real = chunks.real_XT[:, None, :, None].to(v.dtype)
    decay, beta = (_in_chunks(x[..., None].to(v), chunks) * real for x in (decay_UH, beta_UH))
    faded = decay.cumsum(2)  # [X, H, T, 1]: the log of what is left of the state before the chunk
    size = q.shape[2]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (faded - faded.mT).masked_fill(later, -torch.inf).exp()  # decay from column to row

    # What each token adds to the state, v - S^T k with all that was added before it in the chunk:
    # the part that is known now, less the product of `read` and the state before the chunk.
    k_beta = beta * k
    system = (k_beta @ k.mT * between).tril(-1)
    known = torch.cat([beta * v, faded.exp() * k_beta], -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    added, read = solved.split([v.shape[3], k.shape[3]], -1)
    inside = q @ k.mT * between
    q = q * faded.exp()
    k = k * (faded[:, :, -1:] - faded).exp()
    left = faded[:, :, -1:].exp()

    outs, states = [], []
    sizes = [level.end - level.first for level in chunks.levels]
    parts = zip(*(x.split(sizes) for x in (q, k, added, read, inside, left)))
    for level, (q, k, added, read, inside, left) in zip(chunks.levels, parts):
        if level.parent_X is None:
            state = v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
        else:
            state = repeat(states[-1], level.parent_X)
        x = added - read @ state
        outs.append(q @ state + inside @ x)
        states.append(left * state + k.mT @ x)
    out = torch.cat(outs).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, chunks.inverse_U), states


def _in_chunks(x_UHK, chunks):
    """-> [X, H, T, K]."""
    x = x_UHK.index_select(0, chunks.index_XT.flatten()).unflatten(0, chunks.index_XT.shape)
    return x.transpose(1, 2)


# ---------------------------------------------------------------------------------------- the cache
def empty_states(sizes: DeltaSizes, rows: int, dtype, device) -> list[torch.Tensor]:
    """What a cache holds of a layer: the last inputs of the convolution [B, J-1, C], and the states
    [B, H, K, V], in fp32 or more."""
    channels = 2 * sizes.key_heads * sizes.key_dim + sizes.value_heads * sizes.value_dim
    inputs_BJC = torch.zeros(rows, sizes.kernel - 1, channels, dtype=dtype, device=device)
    shape = rows, sizes.value_heads, sizes.key_dim, sizes.value_dim
    precision = torch.promote_types(dtype, torch.float32)
    return [inputs_BJC, torch.zeros(shape, dtype=precision, device=device)]


def states_of_prompts(qkv_UC, states, chunks: Chunks):
    """The same after packed prompts, of each."""
    last_P = chunks.index_XT[chunks.last_S, -1]
    last_JP = torch.cat([last_P[None], chunks.before_JU[:-1, last_P]]).flip(0)
    return F.pad(qkv_UC, (0, 0, 0, 1))[last_JP.T], torch.cat(states)[chunks.last_S]


def step(qkv_BC, decay_BH, beta_BH, weight_CJ, sizes: DeltaSizes, inputs_BJC, state_BHKV):
    """One more token for each row -> out_BHV. inputs_BJC, the last J-1 inputs of the convolution,
    and state_BHKV are changed in place."""
    seen_BJC = torch.cat([inputs_BJC, qkv_BC[:, None]], 1)
    inputs_BJC.copy_(seen_BJC[:, 1:])
    weight_JC = weight_CJ.T.to(torch.promote_types(weight_CJ.dtype, torch.float32))
    q, k, v = split(F.silu((seen_BJC * weight_JC).sum(1)), sizes)
    state_BHKV.mul_(decay_BH.exp()[..., None, None])
    told_BHV = (k[:, :, None] @ state_BHKV)[:, :, 0]
    added_BHV = beta_BH[..., None] * (v - told_BHV)
    state_BHKV.add_(k[..., None] * added_BHV[:, :, None])
    return (q[:, :, None] @ state_BHKV)[:, :, 0].to(qkv_BC.dtype)
