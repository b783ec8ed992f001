"""Attention over packed documents, and over a KV cache.

Shapes: N packed tokens, S documents, U tokens that are computed, B rows of a cache, T positions of
a cache, H query heads, G key/value heads, K width of a head; documents stacked for attention: B
rows, L queries and T keys of each, M tokens with padding, R without it; in a cache: R query heads
of a key head, E key heads of all rows.

Packed tokens of several documents lie in one stream, cut by `cu_seqlens` [S+1]; no query attends to
another document. On CUDA in bf16 or fp16 this is one `varlen_attn` kernel. Elsewhere documents
of similar length are stacked and padded on the right: under a causal mask no real query sees the
padding, so the result is exact, and a batch of five hundred short documents costs a few calls
instead of five hundred.

Documents may share what they begin with (batch.Prefixes): then the U tokens are those that are
computed, and a document's own ones, its last, also see the keys of its prefix. The CUDA kernel gets
the keys of whole documents, gathered, for the queries of the own tokens. On a CPU attention is
computed in parts, and no key is repeated.
"""

import inspect
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Queries and the keys that they see, in rows: where they are among the U tokens."""

    query_BL: torch.Tensor  # where a row is padded it repeats its last token
    key_BT: torch.Tensor
    query_R: torch.Tensor  # the queries without the padding,
    real_R: torch.Tensor  # and which of the B L they are
    causal: bool  # a query sees the keys up to its own place in the row; else, the whole row
    real_BT: torch.Tensor | None = None  # which keys are not padding; None: all


class Packing:
    """Where the documents of a packed stream lie: computed once per batch, used by every layer.

    cu_seqlens: int32 [S+1], starts at 0 and ends at N. max_seqlen: longest document. prefixes: a
    batch.Prefixes, if documents share what they begin with: then queries, keys and values are those
    of the U tokens that are computed, not of all N.
    """

    def __init__(self, cu_seqlens, max_seqlen: int, prefixes=None):
        self.cu_seqlens, self.max_seqlen, self.prefixes = cu_seqlens, max_seqlen, prefixes

    @cached_property
    def stacks(self):
        """Documents grouped by similar length -> (shapes [(rows, L)], index_M, inverse_N).

        x_N[index_M] lays the stacks end to end, and stacked_M[inverse_N] restores the stream. Both
        are None if the stacks already are the stream: one document, or documents of equal length.
        """
        start_S = self.cu_seqlens.cpu().long()
        length_S = start_S.diff()
        shapes, index = [], []
        for alike in _alike(length_S[:, None].tolist()):
            index_BL, real_BL = _rows(start_S[alike], length_S[alike])
            shapes.append(index_BL.shape)
            index.append(index_BL.where(real_BL, -1).flatten())
        index_M = torch.cat(index)
        if index_M.equal(torch.arange(len(index_M))):
            return shapes, None, None
        real_N = (index_M >= 0).nonzero()[:, 0]
        inverse_N = torch.empty_like(real_N).index_copy_(0, index_M[real_N], real_N)
        device = self.cu_seqlens.device
        return shapes, index_M.clamp(min=0).to(device), inverse_N.to(device)

    @cached_property
    def parts(self) -> list[Part]:
        """Where documents share prefixes: the own tokens of each, causal; then, for all tokens that
        follow a prefix, the whole prefix."""
        index_N, cu_own = self.prefixes.index_N, self.prefixes.cu_own
        start_S, own_S = cu_own[:-1].long(), cu_own.diff().long()
        parts = []
        for alike in _alike(own_S[:, None].tolist()):
            index_BL, real_BL = _rows(start_S[alike], own_S[alike])
            real_R = real_BL.flatten().nonzero()[:, 0]
            parts.append(Part(index_BL, index_BL, index_BL[real_BL], real_R, causal=True))
        shared_S = self.cu_seqlens.diff() - own_S
        # Neighbours that share as much share the same.
        shared_R, documents_R = shared_S.unique_consecutive(return_counts=True)
        end_R = documents_R.cumsum(0)
        first_R = end_R - documents_R
        following_R = cu_own[end_R].long() - cu_own[first_R]
        runs = (shared_R > 0).nonzero()[:, 0]
        sizes = torch.stack([following_R, shared_R], 1)[runs].tolist()
        for alike in _alike(sizes):
            first_B = first_R[runs[alike]]
            query_BL, real_BL = _rows(start_S[first_B], following_R[runs[alike]])
            at_BT, real_BT = _rows(self.cu_seqlens[first_B].long(), shared_R[runs[alike]])
            real_R = real_BL.flatten().nonzero()[:, 0]
            queries = query_BL, index_N[at_BT], query_BL[real_BL], real_R
            parts.append(Part(*queries, False, None if real_BT.all() else real_BT))
        return parts


def of_documents(x_NGK, packing: Packing):
    """Packed tokens of documents side by side -> [S, G, T, K], where short of the longest with
    their last token again."""
    start_S, end_S = packing.cu_seqlens[:-1].long(), packing.cu_seqlens[1:].long()
    at_T = torch.arange(packing.max_seqlen, device=start_S.device)
    index_ST = torch.minimum(start_S[:, None] + at_T, end_S[:, None] - 1)
    return rearrange(x_NGK[index_ST], "s t g k -> s g t k")


def _alike(sizes: list[list[int]]) -> list[list[int]]:
    """Indices in groups, largest first: padding to the first of a group adds at most a sixteenth to
    any size."""
    groups = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        first = sizes[groups[-1][0]] if groups else []
        if first and all(16 * max(pair) <= 17 * min(pair) for pair in zip(first, sizes[i])):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _rows(start_B, length_B):
    """Rows of neighbours in a stream -> (index_BL, real_BL); where padded they repeat the last."""
    offset_L = torch.arange(int(length_B.max()))
    last_B1 = length_B[:, None] - 1
    return start_B[:, None] + torch.minimum(offset_L, last_B1), offset_L <= last_B1


def packed_attention(q_NHK, k_NGK, v_NGK, packing: Packing, window: int | None = None):
    """Causal attention inside each document -> [N, H, K], in the input's dtype.

    window: a query sees this many keys, its own included (Mistral's sliding window); None: all.
    """
    if q_NHK.is_cuda and q_NHK.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q_NHK, k_NGK, v_NGK, packing, window)
    if packing.prefixes is None:
        return _stacked(q_NHK, k_NGK, v_NGK, packing, window)
    if q_NHK.is_cpu and (window is None or window >= packing.max_seqlen):
        return _in_parts(q_NHK, k_NGK, v_NGK, packing)
    whole = [repeat(x, packing.prefixes.index_N) for x in (q_NHK, k_NGK, v_NGK)]
    return _stacked(*whole, packing, window).index_select(0, packing.prefixes.first_U)


@torch.compiler.disable
def _in_parts(q_UHK, k_UGK, v_UGK, packing):
    return _InParts.apply(q_UHK, k_UGK, v_UGK, packing.parts)


class _InParts(torch.autograd.Function):
    """Softmax over several sets of keys, each in a call of its own, joined by their log-sum-exps
    (2402.05099, section 3.1). Given the output and the log-sum-exp of all keys, the backward pass
    of a call is its share of the gradients (2307.08691, algorithm 2)."""

    @staticmethod
    def forward(ctx, q_UHK, k_UGK, v_UGK, parts):
        lse_UH = None
        for part in parts:
            q = _stack(q_UHK, part.query_BL)
            k, v = (_stack(x, part.key_BT) for x in (k_UGK, v_UGK))
            out, lse = FLASH(q, k, v, 0.0, part.causal, attn_mask=_bias(part, q.dtype))
            if lse_UH is None:  # in fp32 where the rest is in bf16
                lse_UH = lse.new_full(q_UHK.shape[:2], -torch.inf)
                out_UHK = lse.new_zeros(q_UHK.shape)
            out_RHK, lse_RH = _unstack(out)[part.real_R], _unstack(lse)[part.real_R]
            joined_RH = lse_UH[part.query_R].logaddexp(lse_RH)
            share_RH1 = (lse_RH - joined_RH).exp()[..., None]
            out_RHK = out_RHK.to(lse.dtype)
            out_UHK[part.query_R] = out_UHK[part.query_R].lerp(out_RHK, share_RH1)
            lse_UH[part.query_R] = joined_RH
        out_UHK = out_UHK.to(q_UHK.dtype)
        ctx.save_for_backward(q_UHK, k_UGK, v_UGK, out_UHK, lse_UH)
        ctx.parts = parts
        return out_UHK

    @staticmethod
    def backward(ctx, g_UHK):
        q_UHK, k_UGK, v_UGK, out_UHK, lse_UH = ctx.saved_tensors
        d_UHK = [torch.zeros_like(x, dtype=lse_UH.dtype) for x in (q_UHK, k_UGK, v_UGK)]
        for part in ctx.parts:
            rows, length = part.query_BL.shape
            g_MHK = g_UHK.new_zeros(rows * length, *g_UHK.shape[1:])
            g_MHK[part.real_R] = g_UHK[part.query_R]
            g = g_MHK.unflatten(0, (rows, length)).transpose(1, 2)
            q, out, lse = (_stack(x, part.query_BL) for x in (q_UHK, out_UHK, lse_UH))
            k, v = (_stack(x, part.key_BT) for x in (k_UGK, v_UGK))
            given = g, q, k, v, out, lse, 0.0, part.causal
            gradients = FLASH_BACKWARD(*given, attn_mask=_bias(part, q.dtype))
            dq, dk, dv = (_unstack(x).to(lse.dtype) for x in gradients)
            d_UHK[0].index_add_(0, part.query_R, dq[part.real_R])
            d_UHK[1].index_add_(0, part.key_BT.flatten(), dk)
            d_UHK[2].index_add_(0, part.key_BT.flatten(), dv)
        dq_UHK, dk_UGK, dv_UGK = (d.to(q_UHK.dtype) for d in d_UHK)
        return dq_UHK, dk_UGK, dv_UGK, None


def _stack(x_UHK, index_BL):
    """Rows of a stream -> [B, H, L, K]."""
    return x_UHK.index_select(0, index_BL.flatten()).unflatten(0, index_BL.shape).transpose(1, 2)


def _bias(part, dtype):
    """What is added to scores [B, 1, 1, T]: -inf where a key is padding."""
    if part.real_BT is None:
        return None
    bias_BT = torch.zeros(part.real_BT.shape, dtype=dtype).masked_fill_(~part.real_BT, -torch.inf)
    return bias_BT[:, None, None]


def _unstack(x_BHLK):
    """-> [B L, H, K]."""
    return x_BHLK.transpose(1, 2).flatten(0, 1)


@torch.compiler.disable  # compiled for CUDA, the gradient would be added in any order, in bf16
def repeat(x_U, index_N):
    """x_U[index_N], whose gradient is a sum in a fixed order: each way is such on its device."""
    if x_U.is_cuda:
        return x_U[index_N]
    return x_U.index_select(0, index_N)


def _varlen(q_NHK, k_NGK, v_NGK, packing, window):
    from torch.nn.attention.varlen import varlen_attn

    gqa = {}
    if q_NHK.shape[1] != k_NGK.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            gqa = {"enable_gqa": True}
        else:  # torch 2.11: one key head for each query head
            heads = q_NHK.shape[1] // k_NGK.shape[1]
            k_NGK, v_NGK = k_NGK.repeat_interleave(heads, 1), v_NGK.repeat_interleave(heads, 1)
    keys = queries = packing.cu_seqlens, packing.max_seqlen
    if packing.prefixes is not None:
        index_N, *_, cu_own, max_own = packing.prefixes
        queries = cu_own, max_own
        k_NGK, v_NGK = repeat(k_NGK, index_N), repeat(v_NGK, index_N)
    (cu_q, longest_q), (cu_k, longest_k) = queries, keys
    left = -1 if window is None else window - 1
    # The last query of a document sees all of its keys, the one before all but one, and so on.
    return varlen_attn(
        q_NHK, k_NGK, v_NGK, cu_q, cu_k, longest_q, longest_k, window_size=(left, 0), **gqa
    )


@torch.compiler.disable
def _stacked(q_NHK, k_NGK, v_NGK, packing, window):
    shapes, index_M, inverse_N = packing.stacks
    qkv = q_NHK, k_NGK, v_NGK
    if index_M is not None:
        qkv = [x.index_select(0, index_M) for x in qkv]
    sizes = [rows * longest for rows, longest in shapes]
    stacks = zip(*(x.split(sizes) for x in qkv))
    out = []
    for shape, stack in zip(shapes, stacks):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in stack)
        band = _band(shape[1], window, q.device)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None, enable_gqa=True
        )
        out.append(o.transpose(1, 2).flatten(0, 1))
    out_MHK = torch.cat(out)
    if inverse_N is None:
        return out_MHK
    return out_MHK.index_select(0, inverse_N)


def _band(length, window, device):
    """The mask of a causal window, or None if the window cuts nothing."""
    if window is None or length <= window:
        return None
    at_L = torch.arange(length, device=device)
    back_LL = at_L[:, None] - at_L
    return (back_LL >= 0) & (back_LL < window)


def seen(length_B, longest: int, window: int | None, dtype):
    """What one query per row sees of a cache -> [B, T] of a dtype: 0, or -inf if it does not.

    length_B: keys in use, including the query's. longest: T, at least their maximum.
    """
    at_T = torch.arange(longest, device=length_B.device)
    seen_BT = at_T < length_B[:, None]
    if window is not None:
        seen_BT &= at_T >= length_B[:, None] - window
    nothing = torch.full((), -torch.inf, dtype=dtype, device=length_B.device)
    return nothing.masked_fill(seen_BT, 0)


def cached_attention(q_BHK, k_BGTK, v_BGTK, seen_BT):
    """One query per row over that row's cache -> [B, H, K]. seen_BT: of `seen`."""
    rows, groups, _, width = k_BGTK.shape
    # The R query heads of a key head stand in for query positions, so no key is repeated.
    q_BGRK = q_BHK.reshape(rows, groups, -1, width)
    bias_B11T = seen_BT[:, None, None]
    if not q_BHK.is_cuda and q_BHK.dtype in (torch.float32, torch.float64):
        # With so few queries a CPU takes half the time of its fused kernel for plain products.
        k_EKT, v_ETK = k_BGTK.flatten(0, 1).mT, v_BGTK.flatten(0, 1)
        score_ERT = torch.bmm(q_BGRK.flatten(0, 1) * width**-0.5, k_EKT)
        p_BGRT = score_ERT.unflatten(0, (rows, groups)).add_(bias_B11T).softmax(-1)
        return torch.bmm(p_BGRT.flatten(0, 1), v_ETK).view(q_BHK.shape)
    out_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGTK, v_BGTK, attn_mask=bias_B11T)
    return out_BGRK.reshape(q_BHK.shape)  # on CUDA some kernels write [B, R, G, K]


ROUTES = -1  # in place of a layer, in a Cache


class Cache:
    """What B rows keep of their tokens in every layer, written in place.

    held: of each layer a list of tensors: keys and values [B, G, capacity, K], or the states of
    linear attention. After those of the layers, of a model with experts, [int16 [B, L, capacity,
    A]]: the A experts that each token took in its L mixtures. length_B: tokens in use in each row.
    longest: how many positions attention reads: the caller keeps it above all lengths, and at most
    at the capacity.
    """

    def __init__(self, held: list[list[torch.Tensor]], rows: int, capacity: int, device):
        self.held, self.capacity = held, capacity
        self.length_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0

    def write_prompts(self, layer, *new, row_A, prompt_A):
        """Write what prompts leave into rows: row_A[i] gets prompt prompt_A[i].

        new: keys and values of each prompt [P, G, T, K], or states [P, ...], or experts
        [P, L, T, A].
        """
        for held, new_P in zip(self.held[layer], new):
            held[row_A, :, : new_P.shape[2]] = new_P[prompt_A].to(held.dtype)

    def append(self, layer, *new):
        """Write one token per row after those in use -> what is read: keys and values, or experts.

        new: keys and values of each row [B, G, K], or experts [B, L, A].
        """
        row_B = torch.arange(len(self.length_B), device=self.length_B.device)
        for held, new_B in zip(self.held[layer], new):
            held[row_B, :, self.length_B] = new_B
        return [held[:, :, : self.longest] for held in self.held[layer]]

    def keep(self, row_A):
        """Keep only these rows. The memory of the others is freed, tensor by tensor: old and new
        never exist twice as a whole."""
        for held in self.held:
            for i in range(len(held)):
                held[i] = held[i].index_select(0, row_A)
        self.length_B = self.length_B[row_A]
