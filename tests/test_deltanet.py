"""Gated DeltaNet in chunks against its definition, token by token, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import random_ids, small_model
from test_attention import TREES, packing, tree

from nanopost import batch as batch_module
from nanopost.batch import Example, batch_of
from nanopost.config import DeltaSizes
from nanopost.deltanet import (
    Chunks,
    convolved,
    delta_rule,
    empty_states,
    packed,
    split,
    states_of_prompts,
    step,
)
from nanopost.engine import Engine, Sampling

pytestmark = pytest.mark.usefixtures("few")
qwen3_5 = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")

SIZES = DeltaSizes(key_heads=2, value_heads=4, key_dim=6, value_dim=5, kernel=4)
CHANNELS = 2 * 2 * 6 + 4 * 5
LENGTHS = [1, 63, 64, 65, 200, 3]


def inputs(count, seed=0, dtype=torch.float64, decay=-0.3):
    """qkv_UC, decay_UH, beta_UH, weight_CJ. decay: of the median head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay_UH = decay * (2 * draw(count, 4)).exp()
    given = draw(count, CHANNELS), decay_UH, draw(count, 4).sigmoid(), draw(CHANNELS, 4)
    return [x.to(dtype).requires_grad_() for x in given]


def one_by_one(qkv_TC, decay_TH, beta_TH, weight_CJ):
    """A document, as the module's docstring has it -> out_THV, last inputs, last state."""
    keys, out, rows = 12, [], F.pad(qkv_TC, (0, 0, 3, 0))
    state = qkv_TC.new_zeros(4, 6, 5)
    for t in range(len(qkv_TC)):
        mixed = F.silu((rows[t : t + 4] * weight_CJ.T).sum(0))
        q, k, v = mixed.split([keys, keys, 20])
        q, k = (x.view(2, 6).repeat_interleave(2, 0) for x in (q, k))
        q, k = (x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        state = decay_TH[t].exp()[:, None, None] * state
        told = torch.einsum("hkv,hk->hv", state, k)
        added = beta_TH[t][:, None] * (v.view(4, 5) - told)
        state = state + torch.einsum("hk,hv->hkv", k, added)
        out.append(torch.einsum("hkv,hk->hv", state, q) / 6**0.5)
    return torch.stack(out), rows[-3:], state


def each_alone(given, lengths):
    *tokens, weight = given
    parts = zip(*(x.split(lengths) for x in tokens))
    return [one_by_one(*part, weight) for part in parts]


def assert_equal_with_gradients(got, expected, given, most):
    assert (got - expected).abs().max() <= most
    upstream = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(x, given, upstream) for x in (got, expected))
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= most * b.abs().max()


@pytest.mark.parametrize("decay", [-1e-4, -0.3, -50.0])
@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1], [130], [7] * 9])
def test_chunks_of_packed_documents_give_the_recurrence_of_each_alone(lengths, decay):
    given = inputs(sum(lengths), decay=decay)
    got, _ = packed(*given, SIZES, Chunks.of(packing(lengths), 4))
    expected = torch.cat([out for out, *_ in each_alone(given, lengths)])
    assert_equal_with_gradients(got, expected, given, 1e-10)


@pytest.mark.parametrize("parts", TREES.values(), ids=TREES)
def test_a_document_goes_on_from_the_state_of_its_prefix(parts):
    shared, lengths, (index_N, first_U, *_) = tree(*parts)
    given = inputs(len(first_U))
    got, _ = packed(*given, SIZES, Chunks.of(shared, 4))
    *tokens, weight = given
    whole = [*(x[index_N] for x in tokens), weight]
    expected_N = torch.cat([out for out, *_ in each_alone(whole, lengths)])
    assert_equal_with_gradients(got, expected_N[first_U], given, 1e-10)
    assert (got[index_N] - expected_N).abs().max() <= 1e-10


def test_the_rule_is_that_of_transformers_in_fp32():
    lengths = [65, 200, 3]
    given = inputs(sum(lengths), dtype=torch.float32)
    chunks = Chunks.of(packing(lengths), 4)
    q, k, v = split(convolved(given[0], given[3], chunks.before_JU), SIZES)
    got, states = delta_rule(q, k, v, given[1], given[2], chunks)
    each = zip(*(x.split(lengths) for x in (q * 6**0.5, k, v, given[1], given[2], got)))
    for s, (*tokens, ours) in enumerate(each):
        tokens = [x[None] for x in tokens]
        recurrent = qwen3_5.torch_recurrent_gated_delta_rule
        expected, state = recurrent(*tokens, output_final_state=True)
        assert (ours - expected[0]).abs().max() <= 1e-5
        assert (torch.cat(states)[chunks.last_S[s]] - state[0]).abs().max() <= 1e-5


def test_in_bf16_the_state_and_the_sums_are_in_fp32():
    given = inputs(300, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in given]
    chunks = Chunks.of(packing([300]), 4)
    (got, states), (expected, _) = packed(*given, SIZES, chunks), packed(*exact, SIZES, chunks)
    assert got.dtype == torch.bfloat16 and states[0].dtype == torch.float32
    assert (got - expected).norm() <= 4e-3 * expected.norm()
    upstream = torch.ones_like(expected)
    ours = torch.autograd.grad(got, given, upstream.bfloat16())
    for a, b in zip(ours, torch.autograd.grad(expected, exact, upstream)):
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_no_document_feels_another_even_through_nan():
    given, lengths = inputs(sum(LENGTHS)), torch.tensor(LENGTHS)
    end_S = lengths.cumsum(0)
    expected, _ = packed(*given, SIZES, Chunks.of(packing(LENGTHS), 4))
    for s in range(len(LENGTHS)):
        own = slice(end_S[s] - lengths[s], end_S[s])
        spoilt = [x.detach().clone().requires_grad_() for x in given]
        with torch.no_grad():
            for x in spoilt[:3]:
                x[own] = torch.nan
        got, _ = packed(*spoilt, SIZES, Chunks.of(packing(LENGTHS), 4))
        assert got[own].isnan().all()
        others = torch.ones(len(got), dtype=torch.bool)
        others[own] = False
        assert torch.equal(got[others], expected[others])
        gradient = torch.autograd.grad(got[others].sum(), spoilt[0])[0]
        assert gradient[others].isfinite().all()


def test_a_cache_goes_on_where_prompts_end():
    """Shorter and longer than the convolution and than a chunk; in place."""
    prompts = [1, 2, 3, 64, 70]
    given = [x.detach() for x in inputs(sum(prompts))]
    chunks = Chunks.of(packing(prompts), 4)
    _, states = packed(*given, SIZES, chunks)
    last_inputs, last_states = states_of_prompts(given[0], states, chunks)
    held = empty_states(SIZES, len(prompts), torch.float64, "cpu")
    assert [x.shape for x in held] == [last_inputs.shape, last_states.shape]
    for part, (_, rows, state) in enumerate(each_alone(given, prompts)):
        assert torch.equal(last_inputs[part], rows)
        assert (last_states[part] - state).abs().max() <= 1e-12
    held[0].copy_(last_inputs)
    held[1].copy_(last_states)
    more = [inputs(len(prompts), seed)[:3] for seed in range(1, 7)]
    outs = [step(*(x.detach() for x in token), given[3], SIZES, *held) for token in more]
    tokens = zip(*(x.split(prompts) for x in given[:3]))
    for p, prompt in enumerate(tokens):
        whole = [torch.cat([x, *(t[i][p : p + 1] for t in more)]) for i, x in enumerate(prompt)]
        expected = one_by_one(*whole, given[3])[0]
        assert (torch.stack([out[p] for out in outs]) - expected[-6:]).abs().max() <= 1e-12


def test_chunks_hold_every_token_once_parents_first():
    for parts in TREES.values():
        shared, _, prefixes = tree(*parts)
        chunks = Chunks.of(shared, 4)
        index_U = chunks.index_XT[chunks.real_XT]
        assert index_U.sort().values.equal(torch.arange(len(prefixes.first_U)))
        assert chunks.index_XT.flatten()[chunks.inverse_U].equal(torch.arange(len(index_U)))
        assert chunks.index_XT.shape[1] % 16 == 0
        assert chunks.levels[0].parent_X is None and chunks.levels[-1].end == len(chunks.index_XT)
        for above, level in zip(chunks.levels, chunks.levels[1:]):
            assert above.end == level.first and level.parent_X.max() < above.end - above.first


# ------------------------------------------------------------------------------------- in a model
def hybrid(**changes):
    sizes = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    kind = {"model_type": "qwen3_5_text", "architectures": None, "full_attention_interval": 2}
    return small_model(**kind, **sizes, **changes)


def test_shared_prefixes_change_no_number_in_a_hybrid(monkeypatch):
    model, found = hybrid(num_hidden_layers=4).double(), []
    prompt = random_ids(21, 5)
    rows = [prompt + random_ids(n, n) for n in (3, 70, 9, 1)]
    for share in (1 / 16, 2):
        monkeypatch.setattr(batch_module, "SHARED", share)
        batch = batch_of([Example(row, np.arange(len(row)) >= 21) for row in rows])
        assert (batch.prefixes is None) == (share == 2)
        logp_N, entropy_N = model(batch)
        (logp_N.sum() + entropy_N.square().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((logp_N.detach(), entropy_N.detach(), gradient))
        model.zero_grad(set_to_none=True)
    for ours, expected in zip(*found):
        assert (ours - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("rows", [3, 512])
def test_the_engines_log_probs_are_the_trainers_in_a_hybrid(rows):
    """Rows are taken in while others run, and dropped."""
    model = hybrid(num_hidden_layers=4).double()
    prompts = [random_ids(n, seed=n) for n in (5, 1, 90, 2)]
    engine = Engine(model, stop_ids=range(5), rows=rows)
    groups = engine.generate(prompts, 3, Sampling(24), [0, 9, 18, 27])
    rollouts = [r for group in groups for r in group]
    assert len({len(r.ids) for r in rollouts}) > 3
    batch = batch_of([r.example() for r in rollouts])
    with torch.no_grad():
        logp_N, _ = model(batch)
    assert (logp_N - batch.columns["engine_logp"])[batch.mask_N].abs().max() <= 1e-6
