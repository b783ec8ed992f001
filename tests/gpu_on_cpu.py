"""A stand-in for a GPU: nanopost's CUDA branches run on CPU tensors.

Only nanopost and kernels see `is_cuda` as true; torch itself does not. The operators that exist on
CUDA alone get CPU kernels: mm and addmm with out_dtype, which have no derivative there either, and
varlen_attn, with the signature of either version of torch and with what the CUDA kernel refuses.
"""

import sys
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest.mock import patch

import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F

import kernels.logprob
from nanopost.engine import Engine
from nanopost.logprob import logprob

HALF = torch.bfloat16, torch.float16
library = torch.library.Library("aten", "IMPL")


@torch.library.impl(library, "mm.dtype", "CPU")
def mm(a, b, out_dtype):
    assert a.dtype == b.dtype and a.dtype in HALF and out_dtype == torch.float32
    return a.float() @ b.float()


@torch.library.impl(library, "addmm.dtype", "CPU")
def addmm(total, a, b, out_dtype, *, beta=1, alpha=1):
    assert a.dtype == b.dtype and a.dtype in HALF and total.dtype == out_dtype == torch.float32
    return total + a.float() @ b.float()


def attend(q_NHK, k_NGK, v_NGK, cu_q, cu_k, max_q, max_k, window, gqa):
    """Document by document, with the refusals of flash attention."""
    for x in (q_NHK, k_NGK, v_NGK):
        assert x.dtype in HALF and x.dtype == q_NHK.dtype, "only fp16 and bf16"
        assert x.stride(-1) == 1, "the last dimension must be contiguous"
        assert x.shape[-1] % 8 == 0 and x.shape[-1] <= 256, "head width"
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous(), "offsets must be int32"
        assert isinstance(longest, int) and longest >= int(cu.diff().max())
    assert gqa or q_NHK.shape[1] == k_NGK.shape[1], "without enable_gqa, as many heads of each"
    left, right = window
    assert right == 0, "nanopost is causal"
    out = []
    spans_q, spans_k = (pairwise(cu.tolist()) for cu in (cu_q, cu_k))
    for (first_q, last_q), (first_k, last_k) in zip(spans_q, spans_k, strict=True):
        q = q_NHK[first_q:last_q].transpose(0, 1)
        k, v = (x[first_k:last_k].transpose(0, 1) for x in (k_NGK, v_NGK))
        # Flash attention aligns the mask at the end: the last query sees all keys.
        at_k = torch.arange(last_k - first_k)
        back = at_k[len(at_k) - (last_q - first_q) :, None] - at_k
        seen = (back >= 0) & ((left < 0) | (back <= left))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))
    return torch.cat(out, 1).transpose(0, 1)


def varlen_attn_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, False)


def varlen_attn_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa)


def twin_of_the_kernel(hidden_ND, weight_VD, target_N, temperature=1.0, store=None):
    """Triton's interpreter multiplies bf16 wrongly, so the kernel itself cannot stand here: what it
    accepts, and the numbers of its torch twin. test_kernels.py holds the two equal."""
    assert hidden_ND.dtype == weight_VD.dtype and hidden_ND.dtype in HALF
    assert hidden_ND.is_contiguous() and weight_VD.is_contiguous()
    return logprob(hidden_ND, weight_VD, target_N, temperature, kernels="torch")


@contextmanager
def pretended(varlen_attn=varlen_attn_2_13):
    """-> the set of names of functions of nanopost that have taken a CUDA branch."""
    taken = set()

    def is_cuda(tensor):
        frame = sys._getframe(1)
        ours = frame.f_globals.get("__name__", "").startswith(("nanopost.", "kernels."))
        if ours and tensor.device.type == "cpu":
            taken.add(frame.f_code.co_name)
        return ours

    initialize = Engine.__init__

    def engine(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.check_every = 16  # as on CUDA

    with ExitStack() as stack:
        for replaced in (
            patch.object(torch.Tensor, "is_cuda", property(is_cuda)),
            patch.object(varlen, "varlen_attn", varlen_attn),
            patch.object(kernels.logprob, "logprob_triton", twin_of_the_kernel),
            patch.object(Engine, "__init__", engine),
        ):
            stack.enter_context(replaced)
        yield taken
