"""A stand-in for a GPU: nanopost's CUDA branches run on CPU tensors.

Only nanopost and kernels see `is_cuda` as true; torch itself does not. The operators that exist on
CUDA alone get CPU kernels: mm and addmm with out_dtype, which have no derivative there either, and
varlen_attn, with the signature of either version of torch and with what the CUDA kernel refuses.
A CUDA graph is a list of operators, run again on the same memory.
"""

import sys
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest.mock import patch

import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from syncs import READS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph, and torch.cuda.graph that captures it: operators with their arguments
    and the memory of their results. While it captures, nothing happens to any tensor that was there
    before, and the host may read nothing."""

    captured = []

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.replays = [], [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert str(function) not in READS, f"{function} while a graph is captured"
        kwargs = kwargs or {}
        for value, argument in zip(args, function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before.clear()
        Graph.captured.append(self)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            given = {x.data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(old) and new.data_ptr() != old.data_ptr():
                    assert new.data_ptr() not in given
                    old.copy_(new)


@contextmanager
def graphs():
    """-> list of the graphs that are captured meanwhile."""
    Graph.captured = []
    with (
        patch.object(torch.cuda, "CUDAGraph", Graph),
        patch.object(torch.cuda, "graph", lambda graph, **_: graph),
    ):
        yield Graph.captured


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
        # As on CUDA.
        self.check_every, self.graphs, self.positions, self.spare = 16, True, 256, 2

    with ExitStack() as stack:
        for replaced in (
            patch.object(torch.Tensor, "is_cuda", property(is_cuda)),
            patch.object(varlen, "varlen_attn", varlen_attn),
            patch.object(kernels.logprob, "logprob_triton", twin_of_the_kernel),
            patch.object(Engine, "__init__", engine),
            graphs(),
        ):
            stack.enter_context(replaced)
        yield taken
