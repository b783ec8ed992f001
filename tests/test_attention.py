"""Packed and cached attention against one dense masked softmax in float64."""

import numpy as np
import pytest
import torch

from nanopost import batch
from nanopost.attention import (
    Cache,
    Packing,
    _varlen,
    cached_attention,
    of_documents,
    packed_attention,
    seen,
)
from nanopost.batch import Example, Prefixes

pytestmark = pytest.mark.usefixtures("few")
PACKINGS = {
    "one document": [37],
    "single tokens": [1, 1, 1, 1],
    "equal lengths": [8] * 6,
    "very different": [1, 64, 2, 300, 7, 1],
    "sorted, padded a little": [33, 32, 31, 31, 1],
    "random": torch.randint(1, 40, (30,), generator=torch.Generator().manual_seed(5)).tolist(),
}


def dense(q_NHK, k_NGK, v_NGK, lengths, window):
    """The definition: every query on every key, with a mask of document, causality and window."""
    repeat = q_NHK.shape[1] // k_NGK.shape[1]
    k_NHK, v_NHK = k_NGK.repeat_interleave(repeat, 1), v_NGK.repeat_interleave(repeat, 1)
    document_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at_N = torch.arange(len(document_N))
    back_NN = at_N[:, None] - at_N
    sees_NN = (
        (document_N[:, None] == document_N) & (back_NN >= 0) & (back_NN < (window or len(at_N)))
    )
    score_HNN = torch.einsum("nhk,mhk->hnm", q_NHK, k_NHK) / q_NHK.shape[2] ** 0.5
    p_HNN = score_HNN.masked_fill(~sees_NN, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhk->nhk", p_HNN, v_NHK)


def inputs(N, H, G, K, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(N, heads, K, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for heads in (H, G, G)
    ]


def packing(lengths):
    return Packing(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


@pytest.mark.parametrize("heads, groups", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_packed_equals_the_dense_block_diagonal_softmax_forward_and_backward(
    lengths, window, heads, groups
):
    qkv = inputs(sum(lengths), heads, groups, 8)
    upstream = torch.randn(
        qkv[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    expected, got = dense(*qkv, lengths, window), packed_attention(*qkv, packing(lengths), window)
    assert (got - expected).abs().max() <= 1e-12
    for a, b in zip(
        torch.autograd.grad(got, qkv, upstream), torch.autograd.grad(expected, qkv, upstream)
    ):
        assert (a - b).abs().max() <= 1e-11


def test_fp32_stays_within_rounding_of_float64():
    lengths = PACKINGS["very different"]
    qkv = inputs(sum(lengths), 8, 2, 32, torch.float32)
    got = packed_attention(*qkv, packing(lengths))
    expected = dense(*(x.double() for x in qkv), lengths, None)
    assert got.dtype == torch.float32 and (got - expected).abs().max() <= 1e-5


def test_no_document_feels_another_even_through_nan():
    lengths = [5, 6, 5]
    q, k, v = inputs(16, 4, 2, 8)
    clean = packed_attention(q, k, v, packing(lengths))
    with torch.no_grad():
        for x in (q, k, v):
            x[5:11] = torch.nan
    spoilt = packed_attention(q, k, v, packing(lengths))
    outside = torch.tensor([*range(5), *range(11, 16)])
    assert torch.equal(spoilt[outside], clean[outside]) and spoilt[5:11].isnan().all()


def test_stacks_hold_every_token_once_and_little_padding():
    lengths = torch.randint(1, 200, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    shapes, index_M, inverse_N = packing(lengths).stacks
    assert index_M[inverse_N].equal(torch.arange(sum(lengths)))
    assert sum(rows * longest for rows, longest in shapes) == len(index_M) < sum(lengths) * 17 / 16
    assert len(shapes) < 80


def test_one_document_and_equal_lengths_are_not_moved():
    for lengths in ([37], [8] * 6):
        assert packing(lengths).stacks == ([(len(lengths), lengths[0])], None, None)


# ---------------------------------------------------------------------------------- shared prefixes
def tree(*parts) -> tuple[Packing, list[int], Prefixes]:
    """parts: (tokens taken from the sequence before, tokens of its own)."""
    whole = [shared + own for shared, own in parts]
    ids = []
    for s, (shared, own) in enumerate(parts):
        ids.append(np.concatenate([ids[-1][:shared] if s else [], np.arange(own) + 100 * s]))
    mask_N = np.ones(sum(whole), bool)
    prefixes = batch._prefixes([Example(x, x >= 0) for x in ids], np.array(whole), mask_N)
    assert prefixes.cu_own.diff().tolist() == [own for _, own in parts]
    cu_seqlens = torch.tensor([0, *whole]).cumsum(0).int()
    return Packing(cu_seqlens, max(whole), prefixes), whole, prefixes


TREES = {
    "a group": [(0, 30), (20, 5), (20, 17), (20, 1), (20, 16)],
    "groups of different prompts": [(0, 9), (4, 3), (4, 8), (0, 50), (45, 45), (45, 2), (0, 3)],
    "three turns": [(0, 10), (10, 12), (22, 7), (7, 3), (2, 30)],
    "prompts of similar length, padded": [(0, 40), (33, 5), (0, 40), (34, 5), (0, 40), (34, 5)],
}


@pytest.mark.parametrize("heads, groups", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("window", [None, 3, 25, 90])
@pytest.mark.parametrize("parts", TREES.values(), ids=TREES)
def test_shared_prefixes_give_what_whole_sequences_give(parts, window, heads, groups):
    """Against the dense softmax of the whole sequences, forward and backward."""
    shared, lengths, (index_N, first_U, *_) = tree(*parts)
    qkv = inputs(len(first_U), heads, groups, 8)
    expected_N = dense(*(x[index_N] for x in qkv), lengths, window)
    expected, got = expected_N[first_U], packed_attention(*qkv, shared, window)
    assert (expected_N - expected[index_N]).abs().max() <= 1e-12  # a prefix does not see its end
    assert (got - expected).abs().max() <= 1e-12
    upstream = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(got, qkv, upstream), torch.autograd.grad(expected, qkv, upstream)
    ):
        assert (a - b).abs().max() <= 1e-11


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_shared_prefixes_stay_within_rounding_of_float64(dtype, most):
    shared, lengths, (index_N, first_U, *_) = tree(*TREES["groups of different prompts"])
    qkv = inputs(len(first_U), 8, 2, 32, dtype)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = dense(*(x[index_N] for x in wide), lengths, None)[first_U]
    got = packed_attention(*qkv, shared)
    gradients = zip(
        torch.autograd.grad(got, qkv, torch.ones_like(got)),
        torch.autograd.grad(expected, wide, torch.ones_like(expected)),
    )
    for ours, exact in [(got, expected), *gradients]:
        assert ours.dtype == dtype and (ours - exact).norm() <= most * exact.norm()


def test_gradients_of_many_parts_are_added_in_fp32_whatever_the_parts_are_in():
    """Bf16 sums of 60 of them would be off by more than one rounding."""
    shared, lengths, (index_N, first_U, *_) = tree(
        (0, 130), *[(130 - 3 * i, 1 + 7 * i % 29) for i in range(36)]
    )
    qkv = inputs(len(first_U), 2, 2, 16, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = dense(*(x[index_N] for x in wide), lengths, None)[first_U]
    got = packed_attention(*qkv, shared)
    ours = torch.autograd.grad(got, qkv[1:], torch.ones_like(got))
    exact = torch.autograd.grad(expected, wide[1:], torch.ones_like(expected))
    for a, b in zip(ours, exact):
        assert len(shared.parts) > 50 and (a - b)[:20].norm() <= 4e-3 * b[:20].norm()


def test_large_scores_of_one_part_do_not_spoil_the_other():
    """Where a call by itself would overflow in an exponential."""
    padded = (0, 33), (32, 3), (0, 34), (33, 3)
    shared, lengths, (index_N, first_U, *_) = tree((0, 12), (8, 3), (8, 9), *padded)
    q, k, v = inputs(len(first_U), 2, 2, 8)
    for at in (slice(0, 8), slice(8, None)):
        scaled = k.detach().clone()
        scaled[at] *= 200
        qkv = [x.detach().clone().requires_grad_() for x in (q, scaled, v)]
        expected = dense(*(x[index_N] for x in qkv), lengths, None)[first_U]
        got = packed_attention(*qkv, shared)
        upstream = torch.ones_like(got)
        for a, b in zip(
            [got, *torch.autograd.grad(got, qkv, upstream)],
            [expected, *torch.autograd.grad(expected, qkv, upstream)],
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads, groups", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_cached_equals_the_last_row_of_packed(window, heads, groups):
    lengths = [1, 9, 4, 30]
    q, k, v = (x.detach() for x in inputs(sum(lengths), heads, groups, 8))
    last = torch.tensor(lengths).cumsum(0) - 1
    longest = max(lengths) + 3
    cache_k, cache_v = torch.full((2, len(lengths), groups, longest, 8), 1e3, dtype=torch.float64)
    for row, (kept_k, kept_v) in enumerate(zip(k.split(lengths), v.split(lengths))):
        cache_k[row, :, : lengths[row]], cache_v[row, :, : lengths[row]] = (
            kept_k.transpose(0, 1),
            kept_v.transpose(0, 1),
        )
    seen_BT = seen(torch.tensor(lengths), longest, window, torch.float64)
    got = cached_attention(q[last], cache_k, cache_v, seen_BT)
    assert (got - packed_attention(q, k, v, packing(lengths), window)[last]).abs().max() <= 1e-12


def test_a_cache_holds_each_prompt_once_a_copy_and_what_is_appended_after_it():
    lengths = [2, 5]
    k_NGK, v_NGK = torch.randn(2, sum(lengths), 2, 4)
    cache = Cache([[torch.zeros(6, 2, 8, 4), torch.zeros(6, 2, 8, 4)]], 6, 8, "cpu")
    # In two passes, into rows in any order.
    of_row = [0, 1, 0, 1, 1, 0]
    for rows, prompts in (([5, 1], [0, 1]), ([0, 2, 4, 3], [0, 0, 1, 1])):
        new = [of_documents(x, packing(lengths)) for x in (k_NGK, v_NGK)]
        of_rows = {"row_A": torch.tensor(rows), "prompt_A": torch.tensor(prompts)}
        cache.write_prompts(0, *new, **of_rows)
    cache.length_B.copy_(torch.tensor([lengths[p] for p in of_row]))
    new_k, new_v = torch.randn(2, 6, 2, 4)
    cache.longest = 6
    places = [x.data_ptr() for x in cache.held[0]]
    seen_k, seen_v = cache.append(0, new_k, new_v)
    assert places == [x.data_ptr() for x in cache.held[0]]
    for held, given, new in ((seen_k, k_NGK, new_k), (seen_v, v_NGK, new_v)):
        assert held.shape == (6, 2, 6, 4)
        for row, prompt in enumerate(given.split(lengths)[p] for p in of_row):
            assert torch.equal(held[row, :, : len(prompt)], prompt.transpose(0, 1))
            assert torch.equal(held[row, :, len(prompt)], new[row])
    cache.keep(torch.tensor([1, 2]))
    assert cache.length_B.tolist() == [5, 2]
    assert [held.shape for held in cache.held[0]] == [(2, 2, 8, 4)] * 2
    for held, new in zip(cache.held[0], (new_k, new_v)):
        assert torch.equal(held[0, :, 5], new[1]) and torch.equal(held[1, :, 2], new[2])


def test_the_cuda_kernel_is_called_in_a_way_it_accepts_and_compiles_without_a_break():
    """On meta tensors: names, dtypes and shapes, forward and backward. Its numbers need a GPU."""
    q, k, v = (
        torch.empty(10, heads, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    p = Packing(torch.empty(4, dtype=torch.int32, device="meta"), 5)
    compiled = torch.compile(_varlen, backend="eager", fullgraph=True)
    for window in (None, 3):
        for attend in (_varlen, compiled):
            out = attend(q, k, v, p, window)
            assert out.shape == q.shape
            assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [
                q.shape,
                k.shape,
                v.shape,
            ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads, groups", [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_cuda_kernel_equals_the_dense_softmax_of_the_same_inputs(window, heads, groups):
    lengths = PACKINGS["very different"]
    exact = inputs(sum(lengths), heads, groups, 64)
    on_gpu = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    exact = [x.detach().cpu().double().requires_grad_() for x in on_gpu]
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    got, expected = (
        packed_attention(*on_gpu, Packing(cu, max(lengths)), window),
        dense(*exact, lengths, window),
    )
    upstream = torch.randn(expected.shape, dtype=torch.float64).bfloat16()
    pairs = [
        (got, expected),
        *zip(
            torch.autograd.grad(got, on_gpu, upstream.cuda()),
            torch.autograd.grad(expected, exact, upstream.double()),
        ),
    ]
    for a, b in pairs:
        assert (a.detach().cpu().double() - b.detach()).norm() <= 1e-2 * b.norm()
