"""Log-probability and entropy of each target from hidden states, without the logits, in Triton.

Shapes: M tokens with a target, V vocabulary, C a chunk of it, D width; a tile is BLOCK_M tokens x
BLOCK_V vocabulary entries; J tiles across V.

    z       = hidden W^T / temperature
    logp    = z_y - logsumexp z
    entropy = -sum_v p_v log p_v,    p = softmax z

Forward, one matmul: a tile keeps its logits in registers and writes, for each of its tokens,
m = max z, l = sum e^(z-m), s = sum e^(z-m) (z-m), and the target's logit if it is among them. With
M = max_j m_j and w_j = e^(m_j - M),

    L       = sum_j w_j l_j
    S       = sum_j w_j (s_j + (m_j - M) l_j)
    logp    = z_y - M - log L
    entropy = log L - S / L

No locks and no atomics: the order of every sum is fixed. Because s is centred on its own maximum, a
peaked distribution keeps its entropy.

Backward, with upstream gradients g of logp and h of entropy, by chunks of the vocabulary: recompute
the logits, then

    dz_v = (g (1[v = y] - p_v) - h p_v (z_v - lse + entropy)) / temperature
    dX  += dz W_c
    dW_c = dz^T X

Chunks are of the vocabulary, not of tokens: each row of dW is then written once. A frozen head
needs no dW.

Where memory allows, the forward pass stores e^(z-m) in bf16, and the backward pass takes
p = e^(z-m) e^(m-lse) from there: three matmuls instead of four, for 2 M V bytes. bf16 rounds p by
2^-9 of its value, as it rounds dz; where p is nearly 1, and 1 - p needs more than that, e^(z-m) is
1 and is not rounded at all.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# (BLOCK_M, BLOCK_V, BLOCK_D, warps, stages): no spills on Hopper (tests/test_kernels.py).
STATS = (128, 256, 64, 8, 3)
GRADIENT = (128, 128, 64, 8, 4)
SMALL = (16, 32, 16, 4, 1)  # fp32, in tests: tensor cores would round it
RESTORED_ROWS = 16  # rows of a tile of stored exponentials
CHUNK_BYTES = 2**28  # of dz
STORED_SHARE = 1 / 16  # of a device's memory for stored exponentials: 8,192 x 151,936 take 2.5 GB


@triton.jit
def _logits(
    hidden,
    weight,
    m0,
    v0,
    D,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IEEE: tl.constexpr,
):
    """The fp32 tile of z from token m0 and vocabulary entry v0 on; anything outside reads as 0."""
    z = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        h, w = hidden.load([m0, d]), weight.load([v0, d])
        z = tl.dot(h, w.T, z, input_precision="ieee" if IEEE else "tf32")
    return z * inverse_temperature


@triton.jit
def _tile(M, V, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """-> (first token, tile of the vocabulary). Tokens first: a weight tile is read once."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    return tl.program_id(0) % tiles_m * BLOCK_M, tl.program_id(0) // tiles_m


@triton.jit
def _stats_kernel(
    hidden,
    weight,
    stored,
    target_ptr,
    z_target_ptr,
    m_ptr,
    l_ptr,
    s_ptr,
    M,
    V,
    D,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IEEE: tl.constexpr,
):
    """stored: descriptor of the buffer for e^(z-m), or None."""
    m0, j = _tile(M, V, BLOCK_M, BLOCK_V)
    z = _logits(
        hidden, weight, m0, j * BLOCK_V, D, inverse_temperature, BLOCK_M, BLOCK_V, BLOCK_D, IEEE
    )
    row, column = m0 + tl.arange(0, BLOCK_M), j * BLOCK_V + tl.arange(0, BLOCK_V)
    real = row < M
    target = tl.load(target_ptr + row, mask=real, other=-1)
    z_target = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
    tl.store(z_target_ptr + row, z_target, mask=real & (target // BLOCK_V == j))
    # Finite, not -inf: e^z is 0 either way, and 0 times it is not NaN.
    z = tl.where(column[None, :] < V, z, -1e30)
    m = tl.max(z, 1)
    z -= m[:, None]
    p = tl.exp(z)
    at = j.to(tl.int64) * M + row
    tl.store(m_ptr + at, m, mask=real)
    tl.store(l_ptr + at, tl.sum(p, 1), mask=real)
    tl.store(s_ptr + at, tl.sum(p * z, 1), mask=real)
    if stored is not None:
        stored.store([m0, j * BLOCK_V], p.to(stored.dtype))


@triton.jit
def _store_dz(
    log_p, row, column, target, entropy_ptr, g_ptr, h_ptr, dz_ptr, M, V, first, inverse_temperature
):
    """dz of a tile of log-probs, in V columns that begin at entry `first` of the vocabulary."""
    real = row < M
    entropy = tl.load(entropy_ptr + row, mask=real, other=0.0)
    g = tl.load(g_ptr + row, mask=real, other=0.0)
    h = tl.load(h_ptr + row, mask=real, other=0.0)
    dz = tl.where((column + first)[None, :] == target[:, None], g[:, None], 0.0)
    dz -= tl.exp(log_p) * (g[:, None] + h[:, None] * (log_p + entropy[:, None]))
    dz *= inverse_temperature
    at = dz_ptr + row[:, None].to(tl.int64) * V + column[None, :]
    tl.store(at, dz.to(dz_ptr.dtype.element_ty), mask=real[:, None] & (column < V)[None, :])


@triton.jit
def _gradient_kernel(
    hidden,
    weight,
    target_ptr,
    lse_ptr,
    entropy_ptr,
    g_ptr,
    h_ptr,
    dz_ptr,
    M,
    V,
    D,
    first,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IEEE: tl.constexpr,
):
    """dz from recomputed logits, for the V vocabulary entries that `weight` holds."""
    m0, j = _tile(M, V, BLOCK_M, BLOCK_V)
    z = _logits(
        hidden, weight, m0, j * BLOCK_V, D, inverse_temperature, BLOCK_M, BLOCK_V, BLOCK_D, IEEE
    )
    row, column = m0 + tl.arange(0, BLOCK_M), j * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + row, mask=row < M, other=-1)
    lse = tl.load(lse_ptr + row, mask=row < M, other=0.0)
    log_p = z - lse[:, None]
    _store_dz(
        log_p,
        row,
        column,
        target,
        entropy_ptr,
        g_ptr,
        h_ptr,
        dz_ptr,
        M,
        V,
        first,
        inverse_temperature,
    )


@triton.jit
def _restore_kernel(
    stored_ptr,
    m_ptr,
    target_ptr,
    lse_ptr,
    entropy_ptr,
    g_ptr,
    h_ptr,
    dz_ptr,
    M,
    V,
    width,
    first,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dz from stored exponentials, `width` per row, for V entries from `first` on.

    BLOCK_V is that of the statistics: each tile has its own maximum.
    """
    m0, j = _tile(M, V, BLOCK_M, BLOCK_V)
    row, column = m0 + tl.arange(0, BLOCK_M), j * BLOCK_V + tl.arange(0, BLOCK_V)
    real = row < M
    at = stored_ptr + row[:, None].to(tl.int64) * width + (first + column)[None, :]
    e = tl.load(at, mask=real[:, None] & (column < V)[None, :], other=0.0).to(tl.float32)
    m = tl.load(m_ptr + (first // BLOCK_V + j).to(tl.int64) * M + row, mask=real, other=0.0)
    lse = tl.load(lse_ptr + row, mask=real, other=0.0)
    target = tl.load(target_ptr + row, mask=real, other=-1)
    # Finite; 1e-38 is not a normal fp32 number and would make all of it fp64.
    log_p = tl.log(tl.maximum(e, 2e-38)) + (m - lse)[:, None]
    _store_dz(
        log_p,
        row,
        column,
        target,
        entropy_ptr,
        g_ptr,
        h_ptr,
        dz_ptr,
        M,
        V,
        first,
        inverse_temperature,
    )


def logprob_triton(
    hidden_ND, weight_VD, target_N, temperature: float = 1.0, store: bool | None = None
):
    """As nanopost.logprob.logprob: (logp_N, entropy_N), fp32, both 0 where the target is negative.

    hidden_ND, weight_VD: both fp32, bf16 or fp16; contiguous. Deterministic; differentiable once.
    store: the exponentials, for a faster backward pass; None: if they take no more than
    STORED_SHARE of the device's memory.
    """
    if store is None:
        memory = 0
        if hidden_ND.is_cuda:
            memory = torch.cuda.get_device_properties(hidden_ND.device).total_memory
        store = 2 * len(target_N) * len(weight_VD) <= STORED_SHARE * memory
    wanted = hidden_ND.requires_grad or weight_VD.requires_grad
    store = store and wanted and torch.is_grad_enabled()
    return _Fused.apply(hidden_ND, weight_VD, target_N, temperature, store)


def _spread(x_M, keep_M, num_tokens):
    """Put the rows with a target back in their places among zeros -> [N, ...]."""
    return x_M.new_zeros(num_tokens, *x_M.shape[1:]).index_copy_(0, keep_M, x_M)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature, store):
        keep_M = (target_N >= 0).nonzero()[:, 0]
        hidden_MD, target_M = hidden_ND.index_select(0, keep_M), target_N.index_select(0, keep_M)
        logp_M, entropy_M, lse_M, *stored = _statistics(
            hidden_MD, weight_VD, target_M, temperature, store
        )
        ctx.save_for_backward(hidden_MD, weight_VD, target_M, keep_M, lse_M, entropy_M, *stored)
        ctx.temperature, ctx.num_tokens = temperature, len(target_N)
        ctx.set_materialize_grads(False)
        logp_N = _spread(logp_M, keep_M, len(target_N))
        return logp_N, _spread(entropy_M, keep_M, len(target_N))

    @staticmethod
    def backward(ctx, g_N, h_N):
        hidden_MD, weight_VD, target_M, keep_M, lse_M, entropy_M, *stored = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        g_M = torch.zeros_like(lse_M) if g_N is None else g_N.index_select(0, keep_M)
        h_M = torch.zeros_like(lse_M) if h_N is None else h_N.index_select(0, keep_M)
        chunk = CHUNK_BYTES // (max(1, len(keep_M)) * weight_VD.element_size())
        chunk = max(1024, chunk // 256 * 256)  # whole tiles
        d_hidden_ND = d_hidden_MD = d_weight_VD = None
        if need_hidden:
            d_hidden_MD = torch.zeros_like(hidden_MD, dtype=torch.float32)
        if need_weight:
            d_weight_VD = torch.empty_like(weight_VD)
        for first in range(0, len(weight_VD), chunk):
            weight_CD = weight_VD[first : first + chunk]
            dz_MC = _gradient(
                hidden_MD,
                weight_CD,
                target_M,
                lse_M,
                entropy_M,
                g_M,
                h_M,
                first,
                ctx.temperature,
                *stored,
            )
            if need_hidden:
                d_hidden_MD = _add_product(d_hidden_MD, dz_MC, weight_CD)
            if need_weight:
                torch.mm(dz_MC.T, hidden_MD, out=d_weight_VD[first : first + chunk])
        if need_hidden:
            d_hidden_ND = _spread(d_hidden_MD.to(hidden_MD.dtype), keep_M, ctx.num_tokens)
        return d_hidden_ND, d_weight_VD, None, None, None


def _add_product(sum_MD, a_MC, b_CD):
    """-> sum + a b, accumulated in fp32 whatever a and b are."""
    if a_MC.is_cuda and a_MC.dtype != torch.float32:
        return torch.addmm(sum_MD, a_MC, b_CD, out_dtype=torch.float32)
    return sum_MD.addmm_(a_MC.float(), b_CD.float())


def _statistics(hidden_MD, weight_VD, target_M, temperature, store):
    """-> fp32 logp_M, entropy_M, lse_M; if store, also exponentials e_MV and tile maxima m_JM."""
    tokens, vocabulary = len(hidden_MD), weight_VD.shape[0]
    exact = hidden_MD.dtype == torch.float32
    block_m, block_v, block_d, warps, stages = SMALL if exact else STATS
    tiles = triton.cdiv(vocabulary, block_v)
    m_JM, l_JM, s_JM = (hidden_MD.new_empty(tiles, tokens, dtype=torch.float32) for _ in range(3))
    z_target_M = hidden_MD.new_empty(tokens, dtype=torch.float32)
    stored = ()
    if store:
        width = triton.cdiv(vocabulary, 16) * 16  # TMA and wide loads want aligned rows
        e_MV = hidden_MD.new_empty(tokens, width, dtype=torch.float32 if exact else torch.bfloat16)
        stored = e_MV, m_JM
    if tokens:
        _stats_kernel[(triton.cdiv(tokens, block_m) * tiles,)](
            _descriptor(hidden_MD, block_m, block_d),
            _descriptor(weight_VD, block_v, block_d),
            _descriptor(e_MV, block_m, block_v) if store else None,
            target_M,
            z_target_M,
            m_JM,
            l_JM,
            s_JM,
            tokens,
            vocabulary,
            hidden_MD.shape[1],
            1 / temperature,
            block_m,
            block_v,
            block_d,
            exact,
            num_warps=warps,
            num_stages=stages,
        )
    m_M = m_JM.amax(0)
    w_JM = (m_JM - m_M).exp()
    l_M = (w_JM * l_JM).sum(0)
    s_M = (w_JM * (s_JM + (m_JM - m_M) * l_JM)).sum(0)
    lse_M = m_M + l_M.log()
    return z_target_M - lse_M, l_M.log() - s_M / l_M, lse_M, *stored


def _gradient(
    hidden_MD,
    weight_CD,
    target_M,
    lse_M,
    entropy_M,
    g_M,
    h_M,
    first,
    temperature,
    e_MV=None,
    m_JM=None,
):
    """-> dz_MC in the weight's dtype, from the exponentials if they are given."""
    (tokens, width), entries = hidden_MD.shape, weight_CD.shape[0]
    exact = hidden_MD.dtype == torch.float32
    block_m, block_v, block_d, warps, stages = SMALL if exact else GRADIENT
    dz_MC = torch.empty(tokens, entries, dtype=weight_CD.dtype, device=weight_CD.device)
    upstream = g_M.contiguous(), h_M.contiguous()
    if tokens and e_MV is not None:
        block_v = (SMALL if exact else STATS)[1]
        _restore_kernel[(triton.cdiv(tokens, RESTORED_ROWS) * triton.cdiv(entries, block_v),)](
            e_MV,
            m_JM,
            target_M,
            lse_M,
            entropy_M,
            *upstream,
            dz_MC,
            tokens,
            entries,
            e_MV.shape[1],
            first,
            1 / temperature,
            RESTORED_ROWS,
            block_v,
            num_warps=8,
        )
    elif tokens:
        _gradient_kernel[(triton.cdiv(tokens, block_m) * triton.cdiv(entries, block_v),)](
            _descriptor(hidden_MD, block_m, block_d),
            _descriptor(weight_CD, block_v, block_d),
            target_M,
            lse_M,
            entropy_M,
            *upstream,
            dz_MC,
            tokens,
            entries,
            width,
            first,
            1 / temperature,
            block_m,
            block_v,
            block_d,
            exact,
            num_warps=warps,
            num_stages=stages,
        )
    return dz_MC


def _descriptor(x, rows, columns):
    """A TMA descriptor of tiles. Rows must be multiples of 16 bytes: they are padded with zeros."""
    missing = -x.shape[1] % (16 // x.element_size())
    if missing:
        x = F.pad(x, (0, missing))
    return TensorDescriptor.from_tensor(x, [rows, columns])


def logprob_reference(hidden_ND, weight_VD, target_N, temperature: float = 1.0):
    """The same from the full logits in float64, for tests."""
    log_p_NV = (hidden_ND.double() @ weight_VD.double().T / temperature).log_softmax(-1)
    keep_N = target_N >= 0
    logp_N = log_p_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    return logp_N * keep_N, entropy_N * keep_N
