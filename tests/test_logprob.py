"""Log-prob and entropy of targets: exact in float64, close in bf16, and never [N, V] at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanopost.logprob import logprob

N, D, V = 7, 5, 11
TARGET_N = torch.tensor([3, -100, 0, V - 1, -100, -100, 6])


def inputs(seed=0, n=N, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(rows, D, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for rows in (n, V)
    ]


def plain(hidden_ND, weight_VD, target_N, temperature=1.0):
    """The definition, with the logits whole."""
    log_p_NV = torch.log_softmax(hidden_ND @ weight_VD.T / temperature, -1)
    has_N = target_N >= 0
    logp_N = log_p_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    return logp_N.where(has_N, 0), (-(log_p_NV.exp() * log_p_NV).sum(-1)).where(has_N, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_values_and_gradients_equal_those_of_log_softmax(chunk, temperature):
    qs = inputs()
    got, expected = logprob(*qs, TARGET_N, temperature, chunk), plain(*qs, TARGET_N, temperature)
    upstream = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for a, b in zip(got, expected):
        assert a.dtype == torch.float64 and (a - b).abs().max() <= 1e-14
    gradients = [torch.autograd.grad(out, qs, upstream.unbind()) for out in (got, expected)]
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-13


@pytest.mark.parametrize("outputs", ["logp", "entropy", "both"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_gradcheck(chunk, outputs):
    def function(hidden, weight):
        logp, entropy = logprob(hidden, weight, TARGET_N, 0.7, chunk)
        return {"logp": logp, "entropy": entropy, "both": (logp, entropy)}[outputs]

    assert torch.autograd.gradcheck(function, inputs(), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "target_N", [[0, 1, 2, 3, 4, 5, 10], [-100] * 6 + [0], [-1, -100, -7, 2, 2, 2, 2]]
)
def test_rows_without_a_target_are_zero_and_give_no_gradient(target_N):
    target_N, qs = torch.tensor(target_N), inputs()
    logp_N, entropy_N = logprob(*qs, target_N, chunk=2)
    (logp_N.sum() + entropy_N.square().sum()).backward()
    assert ((logp_N == 0) == (target_N < 0)).all() and ((entropy_N == 0) == (target_N < 0)).all()
    assert ((qs[0].grad == 0).all(-1) == (target_N < 0)).all()


def test_no_target_at_all_gives_zeros_and_a_connected_graph():
    qs = inputs(dtype=torch.float32)
    logp_N, entropy_N = logprob(*qs, torch.full((N,), -100))
    assert not logp_N.any() and not entropy_N.any() and logp_N.dtype == torch.float32
    (logp_N.sum() + entropy_N.sum()).backward()
    assert not qs[0].grad.any() and not qs[1].grad.any()


def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own():
    for frozen in (0, 1):
        qs, free = inputs(), inputs()
        qs[frozen].requires_grad_(False)
        logprob(*qs, TARGET_N)[0].sum().backward()
        logprob(*free, TARGET_N)[0].sum().backward()
        assert qs[frozen].grad is None and torch.equal(qs[1 - frozen].grad, free[1 - frozen].grad)


def test_using_it_twice_adds_the_gradients():
    (hidden, weight), (other, _) = inputs(), inputs(1)
    first, second = logprob(hidden, weight, TARGET_N), logprob(other, weight, TARGET_N, 0.7)
    (first[0].sum() + (first[1] * second[0]).sum()).backward()
    got, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    first, second = plain(hidden, weight, TARGET_N), plain(other, weight, TARGET_N, 0.7)
    (first[0].sum() + (first[1] * second[0]).sum()).backward()
    assert (got[0] - hidden.grad).abs().max() <= 1e-13 and (
        got[1] - weight.grad
    ).abs().max() <= 1e-13


def test_huge_logits_stay_finite_and_right():
    for scale in (30.0, 300.0):
        qs = inputs(scale=scale)
        got, expected = logprob(*qs, TARGET_N), plain(*qs, TARGET_N)
        assert expected[0].min() < -(scale**2) / 2
        for a, b in zip(got, expected):
            assert ((a - b).abs() <= 1e-13 * (1 + b.abs())).all()
        for a, b in zip(
            torch.autograd.grad(got, qs, torch.ones(2, N).double().unbind()),
            torch.autograd.grad(expected, qs, torch.ones(2, N).double().unbind()),
        ):
            assert ((a - b).abs() <= 1e-10 * (1 + b.abs())).all()


def wide(dtype, n=200, d=256, v=4000):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) * 2 / d**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("dtype, grad_tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_inputs_give_the_log_probs_of_their_exact_values(dtype, grad_tolerance):
    """The logits of bf16 inputs stay fp32: rounded to bf16 they would be off by 2e-2."""
    hidden, weight, target_N = wide(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    got, expected = logprob(hidden, weight, target_N, chunk=64), plain(*exact, target_N)
    for a, b in zip(got, expected):
        assert a.dtype == torch.float32 and (a - b).square().mean().sqrt() <= 2e-6
    (got[0].sum() + got[1].sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    for a, b in zip((hidden, weight), exact):
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).norm() <= grad_tolerance * b.grad.norm()


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_the_logits_of_all_tokens_are_never_held():
    hidden, weight, target_N = wide(torch.float32, n=1000, d=8, v=5000)
    with Largest() as seen:
        logp_N, entropy_N = logprob(hidden, weight, target_N, chunk=100)
        (logp_N + entropy_N).sum().backward()
    assert seen.numel == 1000 * 100
    with Largest() as seen:  # nor by default
        sum(logprob(hidden, weight, target_N)).sum().backward()
    assert seen.numel < 1000 * 5000 / 4
    with Largest() as seen:
        plain(hidden, weight, target_N)
    assert seen.numel == 1000 * 5000  # the measure measures


def test_rows_without_a_target_never_meet_the_head():
    hidden, weight, target_N = wide(torch.float32, n=1000, d=8, v=5000)
    target_N[5:] = -100
    with Largest() as seen:
        logprob(hidden, weight, target_N)[0].sum().backward()
    assert seen.numel == 5000 * 8  # the weight's gradient; the logits of five rows are fewer


def test_results_do_not_depend_on_the_chunk():
    hidden, weight, target_N = wide(torch.float32, n=50)
    expected = plain(hidden.double(), weight.double(), target_N)
    for chunk in (7, 97, 4000):
        for a, b in zip(logprob(hidden, weight, target_N, chunk=chunk), expected):
            assert (a - b).abs().max() <= 5e-6


# ---------------------------------------------------------------------------------- renormalised
def kept_ids(target_N, vocab, share=0.4, seed=3):
    """(token_E, id_E), in any order, and the same as a mask: a random set that has the target."""
    draw = torch.Generator().manual_seed(seed)
    kept_NV = torch.rand(len(target_N), vocab, generator=draw) < share
    has_N = target_N >= 0
    kept_NV[has_N, target_N[has_N]] = True
    kept_NV[~has_N] = False
    token_E, id_E = kept_NV.nonzero()[torch.randperm(int(kept_NV.sum()), generator=draw)].T
    return (token_E.int(), id_E.int()), kept_NV


def plain_kept(hidden_ND, weight_VD, target_N, temperature, kept_NV):
    """The definition: the softmax over the kept logits; entropy over all."""
    z_NV = hidden_ND @ weight_VD.T / temperature
    has_N = target_N >= 0
    log_p_NV = z_NV.masked_fill(~kept_NV & has_N[:, None], -torch.inf).log_softmax(-1)
    logp_N = log_p_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0].where(has_N, 0)
    return logp_N, plain(hidden_ND, weight_VD, target_N, temperature)[1]


@pytest.mark.parametrize("outputs", ["logp", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_over_kept_ids_values_and_gradients_are_those_of_a_masked_softmax(
    chunk, temperature, outputs
):
    qs = inputs()
    kept, kept_NV = kept_ids(TARGET_N, V)
    got = logprob(*qs, TARGET_N, temperature, chunk, kept=kept)
    expected = plain_kept(*qs, TARGET_N, temperature, kept_NV)
    for a, b in zip(got, expected):
        assert a.dtype == torch.float64 and (a - b).abs().max() <= 1e-14
    upstream = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    which = {"logp": slice(0, 1), "entropy": slice(1, 2), "both": slice(0, 2)}[outputs]
    gradients = [
        torch.autograd.grad(out[which], qs, list(upstream[which])) for out in (got, expected)
    ]
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-13
    assert (got[0] - logprob(*qs, TARGET_N, temperature)[0]).max() > 0.1  # it is another number


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_gradcheck_over_kept_ids(chunk):
    kept, _ = kept_ids(TARGET_N, V)

    def function(hidden, weight):
        return logprob(hidden, weight, TARGET_N, 0.7, chunk, kept=kept)

    assert torch.autograd.gradcheck(function, inputs(), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_target_kept_alone_is_certain_and_all_kept_is_no_cut(chunk):
    qs, has_N = inputs(dtype=torch.float32), TARGET_N >= 0
    alone = has_N.nonzero()[:, 0], TARGET_N[has_N]
    logp_N, _ = logprob(*qs, TARGET_N, 0.7, chunk, kept=alone)
    assert not logp_N.any()
    (gradient,) = torch.autograd.grad(logp_N.sum(), qs[:1])
    assert gradient.abs().max() < 1e-5
    every = [x.flatten() for x in torch.meshgrid(alone[0], torch.arange(V), indexing="ij")]
    cut, whole = logprob(*qs, TARGET_N, 0.7, chunk, kept=every), logprob(*qs, TARGET_N, 0.7, chunk)
    for a, b in zip(cut, whole):
        torch.testing.assert_close(a, b)


def test_kept_ids_without_mass_left_still_have_finite_log_probs_and_gradients():
    """Off policy, the whole of a kept set may have become next to impossible."""
    for scale in (30.0, 300.0):
        qs = inputs(scale=scale)
        z_NV = (qs[0] @ qs[1].T).detach()
        target_N = z_NV.argmin(1).where(TARGET_N >= 0, -100)
        second_N = z_NV.topk(2, largest=False).indices[:, 1]
        has = (target_N >= 0).nonzero()[:, 0]
        kept = torch.cat([has, has]), torch.cat([target_N[has], second_N[has]])
        kept_NV = torch.zeros(N, V, dtype=torch.bool)
        kept_NV[kept] = True
        got = logprob(*qs, target_N, chunk=3, kept=kept)
        expected = plain_kept(*qs, target_N, 1.0, kept_NV)
        assert plain(*qs, target_N)[0].min() < -(scale**2) / 2
        for a, b in zip(got, expected):
            assert ((a - b).abs() <= 1e-12 * (1 + b.abs())).all()
        for a, b in zip(*[torch.autograd.grad(out[0].sum(), qs) for out in (got, expected)]):
            assert ((a - b).abs() <= 1e-10 * (1 + b.abs())).all()


def test_over_kept_ids_the_logits_of_all_tokens_are_never_held():
    hidden, weight, target_N = wide(torch.float32, n=1000, d=8, v=5000)
    kept, _ = kept_ids(target_N, 5000, share=0.01)
    with Largest() as seen:
        logp_N, entropy_N = logprob(hidden, weight, target_N, chunk=100, kept=kept)
        (logp_N + entropy_N).sum().backward()
    assert len(kept[0]) < seen.numel == 1000 * 100


@pytest.mark.parametrize("dtype, grad_tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_over_kept_ids_low_precision_inputs_give_the_log_probs_of_their_exact_values(
    dtype, grad_tolerance
):
    hidden, weight, target_N = wide(dtype)
    kept, kept_NV = kept_ids(target_N, 4000, share=0.05)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp_N, _ = logprob(hidden, weight, target_N, chunk=64, kept=kept)
    expected_N, _ = plain_kept(*exact, target_N, 1.0, kept_NV)
    assert (logp_N - expected_N).square().mean().sqrt() <= 2e-6
    logp_N.sum().backward()
    expected_N.sum().backward()
    for a, b in zip((hidden, weight), exact):
        assert (a.grad - b.grad).norm() <= grad_tolerance * b.grad.norm()
