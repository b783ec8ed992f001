"""The native engine against the trainer's forward, transformers' samplers and the distribution."""

import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_on_cpu import graphs
from small import random_ids, small_model
from syncs import counted

import nanopost.engine as engine_module
from nanopost import InputError
from nanopost.attention import Cache
from nanopost.batch import Example, batch_of
from nanopost.engine import Engine, Sampling, cut, prompt_seed, sample
from nanopost.save import save_model

PROMPTS = [random_ids(n, seed=n) for n in (5, 1, 17, 9)]
SEEDS = [prompt_seed(0, i) for i in range(len(PROMPTS))]


def trainer_logp(model, rollout, temperature):
    ids = rollout.prompt + rollout.ids
    batch = batch_of([Example(np.array(ids, np.int32), np.arange(len(ids)) >= len(rollout.prompt))])
    with torch.no_grad():
        logp_N, _ = model(batch, temperature)
    return logp_N[batch.mask_N].numpy()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(
    "windows", [{}, {"model_type": "mistral", "architectures": None, "sliding_window": 6}]
)
def test_log_probs_are_the_trainers_at_every_temperature(temperature, windows):
    model = small_model(**windows)
    groups = Engine(model, stop_ids=[3, 7]).generate(PROMPTS, 4, Sampling(24, temperature), SEEDS)
    for rollout in (r for group in groups for r in group):
        np.testing.assert_allclose(
            rollout.logp, trainer_logp(model, rollout, temperature), atol=1e-5
        )


CUTS = [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("cuts", CUTS)
def test_over_the_ids_that_a_cut_kept_log_probs_are_the_trainers(temperature, cuts):
    """Packed with others, and with ids that no token has. So on policy each ratio is 1."""
    model, unused = small_model(), [0, 13, 60]
    engine = Engine(model, stop_ids=range(8), unused_ids=unused)  # rows end at many steps
    sampling = Sampling(24, temperature, kept=True, **cuts)
    groups = engine.generate(PROMPTS, 4, sampling, SEEDS)
    rollouts = [r for group in groups for r in group]
    batch = batch_of([r.example() for r in rollouts])
    with torch.no_grad():
        logp_N, _ = model(batch, temperature)
        whole_N, _ = model(replace(batch, kept=None), temperature)
    gap_N = logp_N - batch.columns["engine_logp"]
    assert gap_N.abs().max() <= 1e-5 and gap_N.exp().sub(1).abs().max() <= 1e-5
    assert (logp_N - whole_N).max() > 0.2 and (logp_N <= 0).all()
    for r in rollouts:
        assert len(r.kept) == len(r.ids) and {ids.dtype for ids in r.kept} == {np.dtype(np.int32)}
        for token, ids in zip(r.ids, r.kept):
            assert token in ids and not set(ids) & set(unused)
            assert len(ids) <= (cuts.get("top_k") or 58)
    assert max(len(ids) for r in rollouts for ids in r.kept) > 3


def test_kept_ids_are_those_of_the_cut_whenever_the_host_looks():
    model, sampling = small_model(), Sampling(30, 0.9, top_k=9, top_p=0.8, kept=True)
    engines = [Engine(model, stop_ids=range(8)) for _ in range(3)]
    engines[1].check_every, engines[2].rows = 7, 5
    found = [engine.generate(PROMPTS, 4, sampling, SEEDS) for engine in engines]
    flat = [[r for group in groups for r in group] for groups in found]
    assert len({len(r.ids) for r in flat[0]}) > 3
    for r, *others in zip(*flat):
        for other in others:
            assert r.ids == other.ids
            assert [x.tolist() for x in r.kept] == [x.tolist() for x in other.kept]
        for t in (0, len(r.ids) - 1):  # by a forward pass over the prefix
            ids = torch.tensor(r.prompt + r.ids[:t])
            cu = torch.tensor([0, len(ids)], dtype=torch.int32)
            with torch.no_grad():
                hidden = model.model.packed(ids, torch.arange(len(ids)), cu, len(ids))
                log_p_1V = (model.logits(hidden[-1:]) / 0.9).log_softmax(-1)
            expected = cut(log_p_1V, 9, 0.8, 0.0)[0].isfinite().nonzero()[:, 0]
            assert r.kept[t].tolist() == expected.tolist()


def test_no_ids_are_kept_where_nothing_is_cut_or_nobody_asks():
    engine = Engine(small_model(), stop_ids=[3])
    samplings = [Sampling(4, kept=True), Sampling(4, 0.0, top_k=3, kept=True), Sampling(4, top_k=3)]
    for sampling in samplings:
        groups = engine.generate(PROMPTS, 1, sampling, SEEDS)
        assert all(r.kept is None for (r,) in groups)
        held_out = replace(sampling, min_p=0.5, top_p=0.5).held_out(1.0)
        assert not held_out.cuts and held_out == replace(samplings[0], kept=sampling.kept)


def test_a_share_of_the_mass_is_of_the_tokens_that_may_be_drawn():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])  # the likeliest cannot be drawn
    uniform, unused = torch.tensor([0.99], dtype=torch.float64), torch.tensor([0])
    sampling = Sampling(1, top_p=0.6, kept=True)
    assert sample(logits, uniform, sampling, unused)[2].tolist() == [[False, True, False, False]]


def test_log_probs_follow_the_weights_after_a_sync():
    model, trained = small_model(0), small_model(1)
    engine = Engine(model, stop_ids=[3])
    engine.sync_weights(trained.state_dict().items(), version=5)
    ((rollout,),) = engine.generate(PROMPTS[:1], 1, Sampling(12), [1])
    assert rollout.version == 5
    np.testing.assert_allclose(rollout.logp, trainer_logp(trained, rollout, 1.0), atol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            rollout.logp, trainer_logp(small_model(0), rollout, 1.0), atol=1e-2
        )


def test_shared_weights_are_seen_without_a_copy():
    model = small_model()
    engine = Engine(model, stop_ids=[], shared=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    before = model.lm_head.weight.data_ptr()
    engine.sync_weights(model.state_dict().items(), version=1)
    ((rollout,),) = engine.generate(PROMPTS[:1], 1, Sampling(6), [1])
    assert model.lm_head.weight.data_ptr() == before
    np.testing.assert_allclose(rollout.logp, trainer_logp(model, rollout, 1.0), atol=1e-5)


@pytest.mark.parametrize(
    "size, dtype, shares",
    [(1, torch.float32, True), (2, torch.float32, False), (1, torch.bfloat16, False)],
)
def test_a_scripts_engine_shares_the_weights_of_one_process_in_fp32(tmp_path, size, dtype, shares):
    model = small_model()
    save_model(tmp_path, model.state_dict().items(), model.config, {})
    world = SimpleNamespace(size=size, dtype=dtype, device=torch.device("cpu"))
    tokenizer = SimpleNamespace(stop_ids={3}, decode=str, unused_ids=lambda size: [size - 1])
    engine = Engine.beside(model, tmp_path, world, tokenizer, rows=7, tokens=900)
    assert (engine.model is model) == engine.shared == shares
    assert (engine.stop_ids, engine.decode, engine.unused_ids.tolist()) == ([3], str, [60])
    assert (engine.rows, engine.tokens) == (7, 900)
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(dtype))
    ahead = Engine.beside(model, tmp_path, world, tokenizer, rows=7, tokens=900, ahead=True)
    assert ahead.model is not model and not ahead.shared


@pytest.mark.parametrize("check_every", [1, 4])
def test_a_sync_between_two_tokens_changes_the_weights_of_the_rest(check_every, monkeypatch):
    """The whole prefix is seen by the new weights, and each token has the version that drew it."""
    old, new = small_model(0), small_model(1)
    engine = Engine(small_model(0), [3, 7, 8, 9, 10])
    engine.check_every = check_every
    decode, tokens, syncs = engine.model.decode, [], []  # tokens: rows of each pass

    def watched(token_A, cache):
        tokens.append(len(token_A))
        if len(tokens) == 4:
            state = new.state_dict().items()
            syncs.append(threading.Thread(target=engine.sync_weights, args=(state, 1)))
            syncs[0].start()
            while not engine.next.locked():
                time.sleep(0.001)
        return decode(token_A, cache)

    monkeypatch.setattr(engine.model, "decode", watched)
    groups = engine.generate(PROMPTS, 4, Sampling(12, 0.7), SEEDS)
    syncs[0].join()
    rollouts = [r for group in groups for r in group]
    assert tokens[-1] < tokens[0] == len(rollouts)  # some end before others
    for r in rollouts:
        assert r.versions.tolist() == ([0] * 5 + [1] * 7)[: len(r.ids)]
        expected = [trainer_logp(model, r, 0.7) for model in (old, new)]
        expected = np.where(r.versions == 0, *expected)
        np.testing.assert_allclose(r.logp, expected, atol=1e-5)
    assert {len(r.ids) > 5 for r in rollouts} == {True, False}


def test_closing_an_engine_ends_what_it_generates(monkeypatch):
    engine = Engine(small_model(0), [3])
    decode = engine.model.decode

    def closing(token_A, cache):
        engine.close()
        return decode(token_A, cache)

    monkeypatch.setattr(engine.model, "decode", closing)
    with pytest.raises(RuntimeError, match="closed while it generated"):
        engine.generate(PROMPTS, 2, Sampling(12))
    assert not engine.busy.locked()


def test_a_rollout_depends_on_its_seed_and_not_on_its_neighbours():
    engine = Engine(small_model(), stop_ids=range(8))  # rows end at many different steps
    together = engine.generate(PROMPTS, 6, Sampling(30), SEEDS)
    again = engine.generate(PROMPTS, 6, Sampling(30), SEEDS)
    alone = [engine.generate([p], 6, Sampling(30), [s])[0] for p, s in zip(PROMPTS, SEEDS)]
    few_rows = Engine(small_model(), stop_ids=range(8), rows=7)
    few_tokens = Engine(small_model(), stop_ids=range(8), tokens=100)
    seldom = Engine(small_model(), stop_ids=range(8))
    seldom.check_every = 7
    others = [e.generate(PROMPTS, 6, Sampling(30), SEEDS) for e in (few_rows, few_tokens, seldom)]
    ids = [[r.ids for r in group] for group in together]
    for other in (again, alone, *others):
        assert ids == [[r.ids for r in group] for group in other]
    assert len({tuple(r) for group in ids for r in group}) > 12
    assert len({len(r) for group in ids for r in group}) > 3


def test_stop_tokens_end_a_completion_and_stay_in_it():
    groups = Engine(small_model(), stop_ids=range(12)).generate(PROMPTS, 8, Sampling(6), SEEDS)
    flat = [r for group in groups for r in group]
    assert {r.finish for r in flat} == {"stop", "length"}
    for r in flat:
        assert len(r.ids) == len(r.logp) <= 6
        assert (r.finish == "stop") == (r.ids[-1] < 12)
        assert all(i >= 12 for i in r.ids[:-1])
        assert r.finish == "stop" or len(r.ids) == 6


@pytest.mark.parametrize("check_every", [1, 6])
def test_stop_strings_end_a_completion(check_every):
    engine = Engine(
        small_model(), stop_ids=[], decode=lambda ids: "".join(chr(97 + i % 26) for i in ids)
    )
    engine.check_every = check_every
    plain = engine.generate(PROMPTS, 4, Sampling(20), SEEDS)
    stopped = engine.generate(PROMPTS, 4, Sampling(20, stop=("a", "bc")), SEEDS)
    for p, s in zip((r for g in plain for r in g), (r for g in stopped for r in g)):
        text = engine.decode(p.ids)
        ends = [text.find(x) + len(x) for x in ("a", "bc") if x in text]
        assert engine.decode(s.ids) == (text[: min(ends)] if ends else text)
        assert s.finish == ("stop" if ends else "length")


def test_greedy_takes_the_likeliest_token_each_time():
    model = small_model()
    for (rollout,) in Engine(model, stop_ids=[]).generate(PROMPTS, 1, Sampling(16, temperature=0)):
        ids = list(rollout.prompt)
        for token in rollout.ids:
            cu = torch.tensor([0, len(ids)], dtype=torch.int32)
            hidden = model.model.packed(torch.tensor(ids), torch.arange(len(ids)), cu, len(ids))
            assert token == int(model.logits(hidden[-1:]).argmax())
            ids.append(token)
        assert not rollout.logp.any()


def test_draws_have_the_frequencies_of_the_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -30.0, -1.0])
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(1, temperature=0.7)
    token_B, logp_B, _ = sample(logits.expand(200_000, -1), uniform, sampling)
    p = (logits / 0.7).softmax(-1)
    assert (
        torch.bincount(token_B, minlength=5) / 200_000 - p
    ).abs().max() < 0.004  # 3.5 standard errors
    torch.testing.assert_close(logp_B, p.log()[token_B])


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    edges = torch.tensor([0.0, 0.5 - 1e-17, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, edges, Sampling(1))[0].tolist() == [1, 3, 3, 3]


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.1), (9, 0.7, 0.05)]
)
def test_cutting_a_distribution_is_that_of_transformers(top_k, top_p, min_p):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(16, 40, generator=torch.Generator().manual_seed(1)) * 2
    expected = logits
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = transformers.MinPLogitsWarper(min_p)(None, expected)
    torch.testing.assert_close(
        cut(logits.log_softmax(-1), top_k, top_p, min_p), expected.log_softmax(-1)
    )


def test_what_cannot_be_sampled_is_refused_in_a_sentence():
    engine = Engine(small_model(), stop_ids=[])
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], 1, Sampling(3))
    with pytest.raises(
        InputError, match="prompt of 200 tokens and 57 new ones exceed the model's 256"
    ):
        engine.generate([[1] * 200], 1, Sampling(57))


def test_a_stop_string_is_found_however_little_its_tokens_say():
    """Tokens of no text, and one of much: what is decoded grows until it holds enough."""
    pieces = {0: "", 1: "e", 2: "nd", 3: "x" * 50, 4: "e"}
    engine = Engine(small_model(), [], decode=lambda ids: "".join(pieces[int(i)] for i in ids))
    ids = np.array([[3, 1, *[0] * 40, 2, 3]])

    def end(ids, seen, stop):
        return engine._ends(ids, np.array([seen]), np.array([ids.size]), stop)

    assert end(ids, 0, ("end",)) == ids.size - 1
    assert end(ids, 30, ("end",)) == ids.size - 1
    assert end(ids, 0, ("ne",)) == 0
    assert end(np.array([[1, 2, 3]]), 0, ("end", "e")) == 1


def test_looking_for_a_stop_string_costs_linear_time():
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return "".join(chr(97 + i % 26) for i in ids)

    engine = Engine(small_model(), stop_ids=[], decode=decode)
    costs = []
    for most in (50, 200):
        decoded.clear()
        engine.generate(PROMPTS[:1], 2, Sampling(most, stop=("never, not once",)), SEEDS[:1])
        costs.append(sum(decoded))
    assert costs[1] < 5 * costs[0]  # quadratic: 16


def test_a_shared_engine_refuses_weights_that_are_not_its_own():
    model = small_model()
    engine = Engine(model, stop_ids=[], shared=True)
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match="the trainer's own weights and was given others"):
        engine.sync_weights(small_model(1).state_dict().items(), 1)
    assert torch.equal(model.lm_head.weight, before)
    engine.sync_weights(model.state_dict().items(), 2)
    assert engine.version == 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ids_that_no_token_has_are_never_drawn(temperature):
    model, unused = small_model(), [0, *range(13, 40), 60]
    plain = Engine(model, stop_ids=[3]).generate(PROMPTS, 8, Sampling(20, temperature), SEEDS)
    assert {i for group in plain for r in group for i in r.ids} & set(unused)
    engine = Engine(model, stop_ids=[3], unused_ids=unused)
    rollouts = [r for g in engine.generate(PROMPTS, 8, Sampling(20, temperature), SEEDS) for r in g]
    assert not {i for r in rollouts for i in r.ids} & set(unused)
    if temperature:
        for r in rollouts:
            np.testing.assert_allclose(r.logp, trainer_logp(model, r, temperature), atol=1e-5)


def test_prefill_and_cache_stay_within_their_tokens(monkeypatch):
    draw = np.random.default_rng(0)
    prompts = [random_ids(int(n), seed=i) for i, n in enumerate(draw.integers(1, 180, 512))]
    model, held, passes = small_model(), [], []
    prefill, cache = model.prefill, model.cache

    def new_cache(rows, capacity):
        held.append(rows * capacity)
        return cache(rows, capacity)

    def watched(token_N, *more):
        passes.append(len(token_N))
        return prefill(token_N, *more)

    monkeypatch.setattr(model, "cache", new_cache)
    monkeypatch.setattr(model, "prefill", watched)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 700)
    groups = Engine(model, stop_ids=[], tokens=6000).generate(prompts, 2, Sampling(3), [0] * 512)
    assert [[r.prompt for r in group] for group in groups] == [[p, p] for p in prompts]
    assert 5000 < max(held) <= 6000 and 600 < max(passes) <= 700
    assert sum(passes) <= sum(map(len, prompts)) + len(held) * 180  # each prompt once, or cut once
    with pytest.raises(InputError, match="exceed --engine_tokens 100: raise it, or lower"):
        Engine(model, stop_ids=[], tokens=100).generate([[1] * 99], 1, Sampling(2))


def test_a_cache_drops_rows_layer_by_layer(monkeypatch):
    held = [[torch.zeros(6, 2, 8, 4), torch.zeros(6, 2, 8, 4)] for _ in range(3)]
    cache, old = Cache(held, 6, 8, "cpu"), [weakref.ref(keys) for keys, _ in held]
    freed, select = [], torch.Tensor.index_select

    def watched(*given):
        freed.append(sum(ref() is None for ref in old))
        return select(*given)

    monkeypatch.setattr(torch.Tensor, "index_select", watched)
    cache.keep(torch.tensor([1, 4]))
    assert freed == [0, 1, 1, 2, 2, 3] and cache.held[2][0].shape[0] == 2


def test_a_device_out_of_memory_is_answered_with_the_flags_to_lower(monkeypatch):
    model = small_model()

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 81 GiB.")

    monkeypatch.setattr(model, "decode", full)
    said = r"lower --engine_tokens \(777\) or --engine_rows \(9\). CUDA out of memory"
    with pytest.raises(InputError, match=said):
        Engine(model, stop_ids=[], rows=9, tokens=777).generate([[1]], 1, Sampling(3))


def test_the_host_waits_for_the_device_once_in_so_many_tokens():
    engine = Engine(small_model(), stop_ids=[3])
    engine.check_every = 16
    counts, lengths = [], []
    for most in (33, 240):
        with counted() as waits:
            groups = engine.generate(PROMPTS[:1], 4, Sampling(most), SEEDS[:1])
        lengths.append(max(len(r.ids) for r in groups[0]))
        counts.append(len(waits))
    assert lengths[1] > 150
    assert counts[1] - counts[0] <= (lengths[1] - lengths[0]) // 16 + 1, waits


def test_with_a_cut_it_waits_three_times_in_so_many_tokens():
    """For the tokens, for how many ids were kept, and for which."""
    engine, sampling = Engine(small_model(), stop_ids=[]), {"top_p": 0.8, "kept": True}
    engine.check_every = 16
    counts = []
    for most in (33, 193):
        with counted() as waits:
            engine.generate(PROMPTS[:1], 4, Sampling(most, **sampling), SEEDS[:1])
        counts.append(len(waits))
    assert counts[1] - counts[0] <= 4 * (193 - 33) // 16, waits


def test_samplings_are_values():
    assert replace(Sampling(5), temperature=0.5) == Sampling(5, 0.5)


@pytest.mark.parametrize("every", [1, 7, 16])
def test_what_it_tells_is_the_rollout(every):
    """In as many parts as the host looks; without the tokens after its end."""
    model = small_model()
    engine = Engine(model, stop_ids=[3, 7], decode=lambda ids: " ".join(map(str, ids)))
    for sampling in (Sampling(40), Sampling(20), Sampling(40, stop=("5",))):
        for seed in range(4):
            ((wanted,),) = engine.generate(PROMPTS[:1], 1, sampling, [seed])
            engine.check_every, told = every, []
            ((rollout,),) = engine.generate(PROMPTS[:1], 1, sampling, [seed], told.append)
            assert rollout.ids == wanted.ids == sum(told, [])
            assert len(told) == -(-len(rollout.ids) // every)
            engine.check_every = 1


# ----------------------------------------------------------------------------- rows and their steps
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("stop", [(), ("9", "4 5")])
def test_a_rollouts_row_goes_to_the_next(every, stop, monkeypatch):
    """Whatever the number of rows: the same tokens, log-probs and ends as of each prompt alone."""
    model, sampling = small_model(), Sampling(30, stop=stop)
    engine = Engine(model, range(8), decode=lambda ids: " ".join(map(str, ids)))
    prompts, seeds = PROMPTS * 3, list(range(0, 1200, 100))
    alone = [engine.generate([p], 3, sampling, [s])[0] for p, s in zip(prompts, seeds)]
    decode, in_use = model.decode, []

    def watched(token_B, cache):
        in_use.append((len(token_B), int((cache.length_B > 0).sum())))
        return decode(token_B, cache)

    monkeypatch.setattr(model, "decode", watched)
    for rows in (1, 5, 16):
        in_use.clear()
        engine = Engine(model, range(8), decode=lambda ids: " ".join(map(str, ids)), rows=rows)
        engine.check_every = every
        groups = engine.generate(prompts, 3, sampling, seeds)
        for group, others in zip(groups, alone, strict=True):
            for r, other in zip(group, others, strict=True):
                assert (r.prompt, r.ids, r.finish) == (other.prompt, other.ids, other.finish)
                np.testing.assert_allclose(r.logp, other.logp, atol=1e-5)
        assert max(size for size, _ in in_use) == rows
        drawn = sum(len(r.ids) for group in groups for r in group) - 36  # one each from its prompt
        assert sum(used for _, used in in_use) >= drawn
        if every == 1:
            assert drawn == sum(used for _, used in in_use)
        if every == 1 and rows == 5:  # one free row is more than an eighth
            assert {used for _, used in in_use[: len(in_use) // 2]} == {5}
            assert len(in_use) < 1.3 * drawn / rows


def test_weights_synced_while_rows_are_passed_on(monkeypatch):
    """Each token has the log-prob, and the version, of the weights that drew it."""
    models = [small_model(seed) for seed in range(4)]
    engine = Engine(small_model(0), range(6), rows=5)
    decode, calls, syncs = engine.model.decode, [], []

    def watched(token_B, cache):
        calls.append(len(token_B))
        if len(calls) % 12 == 0 and len(syncs) < 3:
            version = len(syncs) + 1
            state = models[version].state_dict().items()
            syncs.append(threading.Thread(target=engine.sync_weights, args=(state, version)))
            syncs[-1].start()
            while not engine.next.locked():
                time.sleep(0.001)
        return decode(token_B, cache)

    monkeypatch.setattr(engine.model, "decode", watched)
    groups = engine.generate(PROMPTS, 6, Sampling(24, 0.8), SEEDS)
    versions = set()
    for r in (r for group in groups for r in group):
        each = np.stack([trainer_logp(model, r, 0.8) for model in models])
        expected = each[r.versions, np.arange(len(r.ids))]
        np.testing.assert_allclose(r.logp, expected, atol=1e-5)
        assert (np.diff(r.versions) >= 0).all()
        versions.add(tuple(sorted(set(r.versions.tolist()))))
    assert {v for several in versions for v in several} == {0, 1, 2, 3}
    assert any(len(several) > 1 for several in versions) and any(v[0] > 0 for v in versions)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(40, 0.7),
        Sampling(40, temperature=0),
        Sampling(40, stop=("7", "5 5")),
        Sampling(40, 0.9, top_k=9, top_p=0.8, kept=True),
    ],
)
@pytest.mark.parametrize("rows", [5, 512])
def test_a_step_as_a_graph_is_the_step(sampling, rows):
    """Captured and repeated on the same memory: the same bits."""
    found = []
    for as_graph in (False, True):
        engine = Engine(
            small_model(), range(4), lambda ids: " ".join(map(str, ids)), rows, unused_ids=[9, 60]
        )
        engine.check_every, engine.graphs = 4, as_graph
        engine.positions, engine.spare = 16, 2
        with graphs() as captured:
            found.append(engine.generate(PROMPTS, 4, sampling, SEEDS))
    assert len(captured) > 2 and sum(graph.replays for graph in captured) > 12
    for eager, group in zip(*found, strict=True):
        for r, other in zip(eager, group, strict=True):
            assert (r.ids, r.finish) == (other.ids, other.finish)
            assert r.logp.tobytes() == other.logp.tobytes()
            assert [x.tolist() for x in r.kept or []] == [x.tolist() for x in other.kept or []]


def test_a_graph_sees_weights_that_were_synced(monkeypatch):
    """Between two of its steps: they are copied into the tensors that it reads."""
    old, new = small_model(0), small_model(1)
    engine = Engine(small_model(0), [])
    engine.check_every, engine.graphs, engine.positions = 4, True, 16
    let_others, tokens = engine._let_others, []

    def watched():
        tokens.append(1)
        if len(tokens) != 20:
            return let_others()
        engine.busy.release()
        engine.sync_weights(new.state_dict().items(), 1)
        engine.busy.acquire()
        return True

    monkeypatch.setattr(engine, "_let_others", watched)
    with graphs() as captured:
        groups = engine.generate(PROMPTS, 2, Sampling(40), SEEDS)
    # Of 32, 48 and 57 positions, the longest prompt having 17.
    assert len(captured) == 3 and sum(graph.replays for graph in captured) == 39 - 3
    for r in (r for group in groups for r in group):
        assert r.versions.tolist() == [0] * 20 + [1] * 20
        expected = np.where(r.versions == 0, *(trainer_logp(m, r, 1.0) for m in (old, new)))
        np.testing.assert_allclose(r.logp, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------ a draw
@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 1000])
@pytest.mark.parametrize("unused", [[], [0, 2]])
def test_a_draw_inverts_the_distribution_function_of_float64(vocab, unused):
    """The token at which the exact sum first exceeds the random number; but for numbers within
    rounding of an edge."""
    if vocab == 1 and unused:
        return
    draw = torch.Generator().manual_seed(vocab)
    logits = torch.randn(400, vocab, generator=draw) * 4
    uniform = torch.rand(400, dtype=torch.float64, generator=draw)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    token_B, logp_B, _ = sample(logits, uniform, Sampling(1, 0.7), torch.tensor(unused).long())
    logits = logits.double() / 0.7
    exact = logits.log_softmax(-1)
    gap_B = logp_B - exact.gather(1, token_B[:, None])[:, 0]
    assert gap_B.abs().max() < 4e-6  # logits of up to 25, in fp32
    p_BV = exact.exp()
    p_BV[:, unused] = 0
    cdf_BV = p_BV.cumsum(-1) / p_BV.sum(-1, keepdim=True)
    at_B = token_B[:, None]
    after = cdf_BV.gather(1, at_B)[:, 0]
    before = after - (p_BV.gather(1, at_B) / p_BV.sum(-1, keepdim=True))[:, 0]
    assert (uniform < after + 1e-6).all() and (uniform > before - 1e-6).all()
    assert (p_BV.gather(1, at_B) > 0).all()
    inside = (uniform < after) & (uniform >= before)
    assert inside.float().mean() > 0.99


def test_draws_over_many_blocks_have_the_frequencies_of_the_distribution():
    """Pearson's chi-square over 300 tokens in five blocks: within four standard deviations."""
    draws, vocab = 300_000, 300
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5))
    uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    counts = torch.zeros(vocab)
    for part in uniform.split(30_000):
        token_B = sample(logits.expand(len(part), -1), part, Sampling(1, 1.3))[0]
        counts += torch.bincount(token_B, minlength=vocab)
    expected = draws * (logits / 1.3).double().softmax(-1)
    assert expected.min() > 5
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (vocab - 1)) < 4 * (2 * (vocab - 1)) ** 0.5
