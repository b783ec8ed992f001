"""Attention over packed documents, and over a KV cache.

Shapes: N packed tokens, S documents, B rows of a cache, T positions of a cache, H query heads,
G key/value heads, K width of a head; documents stacked for attention: L length, M tokens with
padding; in a cache: R query heads of a key head, E key heads of all rows.

Packed tokens of several documents lie in one stream, cut by `cu_seqlens` [S+1]; no query attends to
another document. On CUDA in bf16 or fp16 this is one `varlen_attn` kernel. Elsewhere documents
of similar length are stacked and padded on the right: under a causal mask no real query sees the
padding, so the result is exact, and a batch of five hundred short documents costs a few calls
instead of five hundred.
"""

import inspect

import torch
import torch.nn.functional as F
from einops import rearrange


class Packing:
    """Where the documents of a packed stream lie: computed once per batch, used by every layer.

    cu_seqlens: int32 [S+1], starts at 0 and ends at N. max_seqlen: longest document.
    """

    def __init__(self, cu_seqlens, max_seqlen: int):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.stacked = None

    def stacks(self):
        """Documents grouped by similar length -> (shapes [(rows, L)], index_M, inverse_N).

        x_N[index_M] lays the stacks end to end, and stacked_M[inverse_N] restores the stream. Both
        are None if the stacks already are the stream: one document, or documents of equal length.
        """
        if self.stacked is None:
            self.stacked = self._stacks()
        return self.stacked

    def _stacks(self):
        start_S = self.cu_seqlens.cpu().long()
        length_S, order_S = start_S.diff().sort(descending=True, stable=True)
        lengths = length_S.tolist()
        shapes, index, first = [], [], 0
        for i in range(1, len(lengths) + 1):
            # A document joins a stack if padding adds at most a sixteenth to its length.
            if i < len(lengths) and lengths[i] * 17 >= lengths[first] * 16:
                continue
            offset_L = torch.arange(lengths[first])
            index_BL = start_S[order_S[first:i], None] + offset_L
            real_BL = offset_L < length_S[first:i, None]
            shapes.append(index_BL.shape)
            index.append(index_BL.where(real_BL, -1).flatten())
            first = i
        index_M = torch.cat(index)
        if index_M.equal(torch.arange(len(index_M))):
            return shapes, None, None
        real_N = (index_M >= 0).nonzero()[:, 0]
        inverse_N = torch.empty_like(real_N).index_copy_(0, index_M[real_N], real_N)
        device = self.cu_seqlens.device
        return shapes, index_M.clamp(min=0).to(device), inverse_N.to(device)


def packed_attention(q_NHK, k_NGK, v_NGK, packing: Packing, window: int | None = None):
    """Causal attention inside each document -> [N, H, K], in the input's dtype.

    window: a query sees this many keys, its own included (Mistral's sliding window); None: all.
    """
    if q_NHK.is_cuda and q_NHK.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q_NHK, k_NGK, v_NGK, packing, window)
    return _stacked(q_NHK, k_NGK, v_NGK, packing, window)


def _varlen(q_NHK, k_NGK, v_NGK, packing, window):
    from torch.nn.attention.varlen import varlen_attn

    gqa = {}
    if q_NHK.shape[1] != k_NGK.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            gqa = {"enable_gqa": True}
        else:  # torch 2.11: one key head for each query head
            repeat = q_NHK.shape[1] // k_NGK.shape[1]
            k_NGK, v_NGK = k_NGK.repeat_interleave(repeat, 1), v_NGK.repeat_interleave(repeat, 1)
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    left = -1 if window is None else window - 1
    return varlen_attn(q_NHK, k_NGK, v_NGK, cu, cu, longest, longest, window_size=(left, 0), **gqa)


@torch.compiler.disable
def _stacked(q_NHK, k_NGK, v_NGK, packing, window):
    shapes, index_M, inverse_N = packing.stacks()
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


class Cache:
    """Keys and values of B rows in every layer, `capacity` tokens each, written in place.

    length_B: tokens in use in each row. longest: how many positions attention reads: the caller
    keeps it above all lengths, and at most at the capacity.
    """

    def __init__(self, layers, rows, groups, capacity, width, dtype, device):
        shape = (rows, groups, capacity, width)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.length_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0

    def write_prompts(self, layer, k_NGK, v_NGK, cu_seqlens, max_seqlen, row_A, prompt_A):
        """Write packed prompts into rows: row_A[i] gets prompt prompt_A[i]."""
        start_P, end_P = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        at_T = torch.arange(max_seqlen, device=start_P.device)
        index_PT = torch.minimum(start_P[:, None] + at_T, end_P[:, None] - 1)
        for new_NGK, cache_BGTK in ((k_NGK, self.k[layer]), (v_NGK, self.v[layer])):
            new_PGTK = rearrange(new_NGK[index_PT], "p t g k -> p g t k")
            cache_BGTK[row_A, :, :max_seqlen] = new_PGTK[prompt_A]

    def append(self, layer, k_BGK, v_BGK):
        """Write one token per row after those in use -> the keys and values that are read."""
        row_B = torch.arange(len(k_BGK), device=k_BGK.device)
        self.k[layer][row_B, :, self.length_B] = k_BGK
        self.v[layer][row_B, :, self.length_B] = v_BGK
        return self.k[layer][:, :, : self.longest], self.v[layer][:, :, : self.longest]

    def keep(self, row_A):
        """Keep only these rows. The memory of the others is freed, layer by layer: old and new
        never exist twice as a whole."""
        for layer in range(len(self.k)):
            self.k[layer] = self.k[layer].index_select(0, row_A)
            self.v[layer] = self.v[layer].index_select(0, row_A)
        self.length_B = self.length_B[row_A]
