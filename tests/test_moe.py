"""Mixtures of experts against transformers, and the engine's routes in the trainer."""

import base64
import copy
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from gpu_on_cpu import graphs
from inprocess import run_here
from scripts import metrics
from small import SIZES as SMALL
from small import random_ids
from syncs import counted

from nanopost import (
    InputError,
    attribution,
    audit,
    cli,
    dist,
    hf,
    lora,
    moe,
    optim,
    probe,
    recording,
    replay,
)
from nanopost.batch import Example, batch_of, shared
from nanopost.config import Config
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.forward import batches, logprobs
from nanopost.model import ActorCritic, CausalLM, MoE
from nanopost.retrace import Recorded
from nanopost.rollout import Rollout
from nanopost.save import save_model
from nanopost.server import Refused, ServerError
from nanopost.vllm import Servers
from runs import toy

transformers = pytest.importorskip("transformers")

SIZES = SMALL | {
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_expert_intermediate_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CASES = {
    "qwen3_moe": ("Qwen3Moe", {"norm_topk_prob": True}),
    "not normalised, a dense layer": (
        "Qwen3Moe",
        {"norm_topk_prob": False, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "qwen3_5_moe": ("Qwen3_5Moe", DELTA),
}


def oracle_of(case):
    """A transformers model whose weights are large enough that experts and shares matter."""
    family, given = CASES[case]
    kind = family + ("TextConfig" if family == "Qwen3_5Moe" else "Config")
    config = getattr(transformers, kind)(**SIZES | given)
    torch.manual_seed(3)
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.2)
            elif not name.endswith(("A_log", "dt_bias")):
                p.add_(0.2 * torch.randn_like(p))
    return model


def ours_of(oracle) -> CausalLM:
    model = CausalLM(Config.of({**oracle.config.to_dict()}))
    model.load_state_dict(oracle.state_dict())
    return model


def small(seed=0, case="qwen3_moe", **changes) -> CausalLM:
    """A random model. Routers are so weak that many scores are nearly equal."""
    family, given = CASES[case]
    kind = {"qwen3_moe": "qwen3_moe", "qwen3_5_moe": "qwen3_5_moe_text"}[case]
    config = Config.of({"model_type": kind, "initializer_range": 0.2, **SIZES, **given, **changes})
    model = CausalLM(config).init_weights(seed)
    with torch.no_grad():
        for mixture in mixtures(model):
            mixture.gate.weight.mul_(0.01)
    return model


def mixtures(model) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def replaying(model):
    """The model as a run's policy."""
    model.model.replays = True
    return model


class Rounded:
    """Routes that an engine of other kernels would take: its scores are off by a little."""

    def __init__(self, routes, draw):
        self.routes, self.draw = routes, draw

    def choose(self, number, score_NE, active):
        noise_NE = 1e-3 * torch.randn(score_NE.shape, generator=self.draw)
        return self.routes.choose(number, score_NE * noise_NE.exp(), active)


def with_rounding(model):
    """The same model, with scores for the choice of experts that are off by 1e-3."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for mixture in mixtures(other):
        forward = mixture.forward
        mixture.forward = lambda x, routes, f=forward: f(x, Rounded(routes, draw))
    return other


PROMPTS = [random_ids(n, seed=n) for n in (5, 1, 17, 9)]
SEEDS = [prompt_seed(0, i) for i in range(len(PROMPTS))]


def flat(groups):
    return [rollout for group in groups for rollout in group]


def rollouts_of(model, n=3, most=12, **how):
    engine = Engine(model, stop_ids=[3, 7], **how)
    return flat(engine.generate(PROMPTS, n, Sampling(most), SEEDS))


def gap(model, rollouts, tokens=1000):
    """The largest difference between the log-probs of engine and trainer."""
    examples = [r.example() for r in rollouts]
    found = logprobs(model, examples, tokens, 1.0, "cpu")
    pairs = [(e.columns["engine_logp"], logp_T * e.mask) for e, logp_T in zip(examples, found)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


# ------------------------------------------------------------------------------------- the mixture
LENGTHS = (1, 23, 9, 9)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_transformers(case):
    """Packed here, one by one there. An expert without a token has a gradient of zeros."""
    oracle = oracle_of(case)
    model = ours_of(oracle)
    docs = [torch.tensor(random_ids(n, seed=n)) for n in LENGTHS]
    batch = batch_of([Example(doc.numpy(), np.arange(len(doc)) > 0) for doc in docs])
    stream = batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
    got = model.logits(model.model.packed(*stream))
    expected = torch.cat([oracle(doc[None]).logits[0] for doc in docs])
    assert expected.std() > 1  # else agreement would mean little
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

    logp_N, _ = model(batch)
    logp_N.sum().backward()
    theirs = expected.log_softmax(-1)[torch.arange(len(logp_N)), batch.target_N.clamp(min=0)]
    theirs[batch.mask_N].sum().backward()
    unused = 0
    for name, p in oracle.named_parameters():
        mine = model.get_parameter(name).grad
        most = 1e-4 * max(1.0, float(p.grad.abs().max()))
        assert (mine - p.grad).abs().max() <= most, name
        if "experts." in name:
            unused += int((mine.flatten(1) == 0).all(1).sum())
    assert unused or case != "qwen3_moe"


def test_the_groups_of_one_kernel_are_those_of_the_loop():
    draw = torch.Generator().manual_seed(0)
    x_RI = torch.randn(9, 16, generator=draw)
    weight_EOI = torch.randn(5, 8, 16, generator=draw)
    end_E = torch.tensor([0, 4, 4, 8, 9])
    found = []
    for multiply in (moe.one_by_one, moe.grouped):
        x, weight = x_RI.clone().requires_grad_(), weight_EOI.clone().requires_grad_()
        out = multiply(x, weight, end_E)
        out.square().sum().backward()
        found.append((out, x.grad, weight.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    expert_R = [1, 1, 1, 1, 3, 3, 3, 3, 4]
    expected = torch.stack([weight_EOI[e] @ x for e, x in zip(expert_R, x_RI)])
    torch.testing.assert_close(found[0][0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_step_of_the_engine_waits_for_no_count_where_there_is_one_kernel(monkeypatch):
    """A CUDA graph could not wait."""
    monkeypatch.setattr(moe, "is_grouped", lambda weight_EDF: True)
    model = small()
    cache = model.cache(2, 8)
    cache.longest = 8
    with counted() as reads:
        model.decode(torch.tensor([5, 9]), cache)
    assert reads == [] and moe.needs_no_host(model)
    monkeypatch.setattr(moe, "is_grouped", lambda weight_EDF: False)
    assert not moe.needs_no_host(model)
    with counted() as reads:
        model.decode(torch.tensor([5, 9]), cache)
    assert reads


def test_a_graph_of_a_step_names_the_experts_of_each_repetition(monkeypatch):
    """Its shapes stay the same, whatever experts are taken."""
    monkeypatch.setattr(moe, "is_grouped", lambda weight_EDF: True)
    found = []
    for as_graph in (False, True):
        engine = Engine(small(), range(4), rows=6)
        engine.check_every, engine.graphs = 4, as_graph
        engine.positions, engine.spare = 16, 2
        with graphs() as captured:
            found.append(flat(engine.generate(PROMPTS, 3, Sampling(24), SEEDS)))
    assert sum(graph.replays for graph in captured) > 12
    for eager, repeated in zip(*found, strict=True):
        assert eager.ids == repeated.ids
        assert np.array_equal(eager.routes, repeated.routes)


@pytest.mark.parametrize("how", ["full", "selective", "compile"])
def test_what_is_computed_again_or_compiled_has_the_same_gradients(how):
    """With scores so close that another rounding would choose other experts."""
    batch = batch_of([Example(random_ids(n, n), np.arange(n) > 0) for n in (20, 7)])
    found = []
    for changed in (False, True):
        model = small()
        if changed and how == "compile":  # inductor would take a minute
            for block in model.model.layers:
                block.compile(backend="eager")
        elif changed:
            model.model.checkpointing = how
        logp_N, _ = model(batch)
        logp_N.sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_block_that_is_computed_again_takes_the_same_experts():
    routes = moe.Routes()
    first = routes.choose(0, torch.tensor([[0.2, 0.5, 0.3]]), 1)
    again = routes.choose(0, torch.tensor([[0.5, 0.2, 0.3]]), 1)
    assert first.tolist() == again.tolist() == [[1]]


@pytest.mark.parametrize(
    "change, words",
    [({"num_experts_per_tok": 17}, "17 of num_experts 16"), ({"num_experts_per_tok": 0}, "0 of")],
)
def test_impossible_numbers_of_experts_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        small(**change)


def test_without_experts_it_is_a_dense_model():
    for change in ({"num_experts": 0}, {"mlp_only_layers": [0, 1]}):
        model = small(**change)
        assert model.config.experts is None and not mixtures(model)
        assert rollouts_of(model)[0].routes is None


# ------------------------------------------------------------------------------------------- ranks
def _rank(rank, size, folder, adapters):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / f'store-{size}'}", rank=rank, world_size=size
    )
    torch.set_num_threads(1)
    world = dist.World(rank, size, torch.device("cpu"), torch.float32)
    model = small(case="qwen3_5_moe")
    if adapters:
        weights = copy.deepcopy(model.state_dict())
        with torch.device("meta"):
            model = lora.apply(CausalLM(model.config), 2)
        model = dist.shard(model, world).to_empty(device="cpu")
        with torch.no_grad():
            for name, p in model.named_parameters():
                hf._copy(p, weights.get(name, torch.full(p.shape, 0.1)))
    else:
        dist.shard(model, world)
    optimizer = optim.adamw(model, 0.0)
    optim.set_learning_rate(optimizer, 1e-3)
    examples = [Example(random_ids(n, n), np.arange(n) > 0) for n in (3, 4, 30, 7)]
    for batch in batches(model, examples[rank::size], 40, "cpu"):
        logp_N, _ = model(batch)
        (-logp_N.sum()).backward()
    gradients = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradients[name] = dist.full_tensor(p.grad)  # never None
    used = moe.load_metrics(model)
    optimizer.step()
    weights = dict(dist.full_weights(model))
    if rank == 0:
        torch.save((gradients, used, weights), folder / f"{size}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapters", [False, True])
def test_two_ranks_have_the_gradients_and_the_load_of_one(tmp_path, adapters):
    found = []
    for size in (1, 2):
        how = {"nprocs": size, "start_method": "fork"}
        mp.start_processes(_rank, (size, tmp_path, adapters), **how)
        found.append(torch.load(tmp_path / f"{size}.pt", weights_only=False))
    (one, used, weights), (two, used_2, weights_2) = found
    assert one.keys() == two.keys() and used == used_2 and used["experts/max_violation"] > 0
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)
    assert weights.keys() == weights_2.keys() == small(case="qwen3_5_moe").state_dict().keys()
    mixed = [name for name in one if ".mlp." in name]
    assert mixed and all("shared_expert" in name for name in mixed) == adapters


def test_adapters_are_beside_linear_layers_alone():
    config = small(case="qwen3_5_moe").config
    with torch.device("meta"):
        model = lora.apply(CausalLM(config), 2)
    names = {name.rpartition(".mlp.")[2] for name in lora.layers(model) if ".mlp." in name}
    parts = {f"shared_expert.{part}_proj" for part in ("gate", "up", "down")}
    assert names == {*parts, "shared_expert_gate"}
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".experts." in name)


# ---------------------------------------------------------------------------------------- the load
def test_the_load_is_counted_once_in_training_alone(alone):
    model = small()
    examples = [Example(random_ids(n, n), np.arange(n) > 0) for n in (20, 7)]
    batch = batch_of(examples)
    assert moe.load_metrics(model) == {}
    with torch.no_grad():
        model(batch)
    model(batch_of([]))  # a dummy
    assert moe.load_metrics(model) == {}
    model.model.checkpointing = "full"
    logp_N, _ = model(batch)
    logp_N.sum().backward()
    used_LE = model.model.used_LE
    stream = batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
    routes = moe.Routes()
    model.model.packed(*stream, None, routes)
    violations, unused = [], []
    for number in range(2):
        took = routes.taken[number].flatten().tolist()
        tokens = [took.count(e) for e in range(16)]
        assert used_LE[number].tolist() == tokens and sum(tokens) == 27 * 3
        violations.append(max(tokens) / (27 * 3 / 16) - 1)
        unused.append(tokens.count(0) / 16)
    found = moe.load_metrics(model)
    assert found == {
        "experts/max_violation": pytest.approx(sum(violations) / 2),
        "experts/unused_ratio": pytest.approx(sum(unused) / 2),
    }
    assert moe.load_metrics(model) == {}


def test_an_auxiliary_loss_that_is_asked_for_is_said_to_be_off():
    asked = {"router_aux_loss_coef": 0.02, "output_router_logits": True}
    assert "router_aux_loss_coef 0.02" in moe.no_auxiliary_loss(small(**asked))
    assert moe.no_auxiliary_loss(small(router_aux_loss_coef=0.02)) == ""  # as in transformers
    assert moe.no_auxiliary_loss(small()) == ""
    assert moe.no_auxiliary_loss(small(router_aux_loss_coef=0.0)) == ""


# ----------------------------------------------------------------------------------- router replay
@pytest.mark.parametrize("case", ["qwen3_moe", "qwen3_5_moe"])
def test_the_trainer_takes_the_engines_experts(case, alone):
    """Where rounding has other experts chosen, log-probs differ without replay. Packed with others,
    prefixes shared, and on rows that are given to one rollout after another."""
    model = small(case=case)
    together = rollouts_of(with_rounding(model))
    in_turn = rollouts_of(with_rounding(model), rows=5)
    assert min(gap(model, together), gap(model, in_turn)) > 1e-2
    replaying(model)
    assert max(gap(model, together), gap(model, in_turn)) <= 1e-4
    assert gap(model, together, tokens=30) <= 1e-4
    batch = batch_of([r.example() for r in together[6:9]])
    assert len(batch.prefixes.first_U) == len(batch.token_N) - 2 * len(PROMPTS[2])
    for r in together + in_turn:
        tokens = len(r.prompt) + len(r.ids)
        assert r.routes.shape == (tokens, model.config.mixtures, 3) and r.routes.dtype == np.int16
        assert (r.routes[-1] == -1).all() and (r.routes[:-1] >= 0).all()


def test_without_rounding_the_engines_experts_are_the_trainers(alone):
    model = small()
    rollouts = rollouts_of(model)
    assert gap(model, rollouts) <= 1e-4
    for r in rollouts[:4]:
        ids = torch.tensor(r.prompt + r.ids)
        routes = moe.Routes()
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        model.model.packed(ids, torch.arange(len(ids)), bounds, len(ids), None, routes)
        assert (routes.taken_NLA().numpy()[:-1] == r.routes[:-1]).all()


def test_the_router_learns_from_experts_that_it_was_given():
    """The weights are the trainer's own scores, made to add up over the given experts
    (2510.11370): d w_a / d s = the derivative of a softmax over these alone."""
    model = replaying(small())
    rollout = rollouts_of(with_rounding(model), n=1)[2]
    logp_N, _ = model(batch_of([rollout.example()]))
    logp_N.sum().backward()
    assert all(mixture.gate.weight.grad.abs().sum() > 0 for mixture in mixtures(model))
    mixture = mixtures(model)[0]
    x_ND = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    given = torch.tensor([[[2, 9, 4]]])
    out_ND = mixture(x_ND, moe.Routes(given))
    weight_A = (x_ND @ mixture.gate.weight.T)[0, given[0, 0]].softmax(0)
    expected = torch.zeros(32)
    for weight, e in zip(weight_A, given[0, 0]):
        gate, up = (mixture.experts.gate_up_proj[e] @ x_ND[0]).chunk(2)
        product = torch.nn.functional.silu(gate) * up
        expected = expected + weight * (mixture.experts.down_proj[e] @ product)
    torch.testing.assert_close(out_ND[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_that_change_in_the_middle_give_the_routes_of_what_is_computed_anew(alone):
    """The engine fills its cache again; tokens after that are of one model and one set of
    routes."""
    first, second = small(), replaying(small(seed=1))
    engine = Engine(with_rounding(first), stop_ids=[])
    rounds, let_others = [], engine._let_others

    def sync(self=engine):
        rounds.append(1)
        if len(rounds) == 6:
            for name, p in second.named_parameters():
                engine.model.get_parameter(name).data.copy_(p)
            engine.version = 1
            return True
        return let_others()

    engine._let_others = sync
    rollouts = flat(engine.generate(PROMPTS, 2, Sampling(12), SEEDS))
    for r in rollouts:
        new = np.flatnonzero(r.versions == 1)
        assert 0 < len(new) < 12
        (logp_T,) = logprobs(second, [r.example()], 1000, 1.0, "cpu")
        np.testing.assert_allclose(logp_T[len(r.prompt) :][new], r.logp[new], atol=1e-4)


def test_only_the_policy_replays(alone):
    """A reference, a base under adapters and a value model choose their own experts."""
    model = replaying(small())
    rollouts = rollouts_of(with_rounding(model))
    examples = [r.example() for r in rollouts]
    free = [replace(e, routes=None) for e in examples]
    reference = small(seed=1)
    with_routes, without = (logprobs(reference, x, 1000, 1.0, "cpu") for x in (examples, free))
    for a, b in zip(with_routes, without):
        np.testing.assert_allclose(a, b, atol=1e-5)
    off = logprobs(lora.Reference(model), examples, 1000, 1.0, "cpu")
    base = logprobs(small(), free, 1000, 1.0, "cpu")
    for a, b in zip(off, base):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert model.model.replays and gap(model, rollouts) <= 1e-4

    critic = ActorCritic(model.config, model.config.with_scalar_head(0))
    for p in critic.parameters():
        p.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    replaying(critic.policy)
    with torch.no_grad():
        *_, value_N = critic(batch_of(examples))
        *_, free_N = critic(batch_of(free))
    torch.testing.assert_close(value_N, free_N)


def test_prompts_of_other_experts_are_not_shared():
    """Examples begin alike if their tokens have the same experts, too."""
    ids = random_ids(20, 4)
    mask = np.arange(20) >= 15
    routes = np.zeros((20, 2, 3), np.int16)
    other = routes.copy()
    other[7, 1, 2] = 5
    one, two = (Example(ids, mask, routes=x) for x in (routes, other))
    assert shared([one, one, two, one, Example(ids, mask)]) == [0, 19, 7, 7, 0]
    batch = batch_of([one, one, two])
    assert batch.routes_ULA.tolist() == np.concatenate([routes, routes[19:], other[7:]]).tolist()


def test_micro_batches_count_what_is_not_shared(alone):
    """Twelve samples of a prompt, each with experts of its own for it, do not fit where twelve that
    share it do."""
    ids, mask = random_ids(40, 4), np.arange(40) >= 35
    draw = np.random.default_rng(0)
    own = [draw.integers(0, 16, (40, 2, 3)).astype(np.int16) for _ in range(12)]
    found = []
    for routes in (own, own[:1] * 12):
        examples = [Example(ids, mask, routes=x) for x in routes]
        sizes = []
        for batch in batches(small(), examples, 100, "cpu"):
            sizes.append(len(batch.token_N if batch.routes_ULA is None else batch.routes_ULA))
        found.append(sizes)
    assert found == [[80] * 6, [95]]


def test_the_same_ids_with_other_experts_have_other_log_probs(alone):
    model = replaying(small())
    ids, mask = random_ids(9, 4), np.arange(9) > 0
    routes = [
        np.full((9, 2, 3), first, np.int16) + np.arange(3, dtype=np.int16) for first in (0, 5)
    ]
    examples = [Example(ids, mask, routes=x) for x in routes]
    one, two = logprobs(model, examples, 1000, 1.0, "cpu")
    assert np.abs(one - two).max() > 1e-2


def test_examples_without_routes_choose_among_those_with_them(alone):
    model = replaying(small())
    sampled = [r.example() for r in rollouts_of(with_rounding(model))][:3]
    stored = [Example(random_ids(9, 2), np.arange(9) > 3)]
    together = logprobs(model, sampled + stored, 1000, 1.0, "cpu")
    apart = logprobs(model, sampled, 1000, 1.0, "cpu") + logprobs(model, stored, 1000, 1.0, "cpu")
    for a, b in zip(together, apart):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_routes_of_another_model_are_refused(alone):
    model = replaying(small())
    (count, active), layers = model.config.experts[:2], model.config.mixtures
    wrong = [np.zeros((9, layers, active + 1)), np.zeros((9, layers - 1, active))]
    wrong += [np.zeros((9, layers + 1, active)), np.full((9, layers, active), count)]
    for routes in wrong:
        e = Example(random_ids(9, 1), np.arange(9) > 0, routes=routes.astype(np.int16))
        with pytest.raises(InputError, match="are of another model"):
            model(batch_of([e]))
    with pytest.raises(InputError, match="9 tokens and the experts of 3"):
        Example(random_ids(9, 1), np.arange(9) > 0, routes=np.zeros((3, 2, 3), np.int16))


def test_a_second_turn_adds_its_routes_to_those_that_were_taken():
    def routes(*numbers):
        return np.array(numbers, np.int16)[:, None, None]

    zeros = np.zeros(2, np.float32)
    first = Rollout([1, 2], [3, 4], zeros, "stop", 0, routes=routes(10, 11, 12, -1))
    answer = routes(20, 21, 22, 23, 24, 25, -1)
    first.extend([5], Rollout([1, 2, 3, 4, 5], [6, 7], zeros, "stop", 0, routes=answer))
    assert first.routes.flatten().tolist() == [10, 11, 12, 23, 24, 25, -1]
    assert len(first.example().routes) == len(first.example())
    part = first.example()[1:3]
    assert part.routes.flatten().tolist() == [11, 12]
    # Newer weights saw the turns before with experts of their own.
    third = Rollout([1] * 7, [8], zeros[:1], "stop", 1, routes=routes(*range(30, 38)))
    first.extend([], third)
    assert first.routes.flatten().tolist() == [*range(30, 38)]
    # A server that names none: the trainer chooses.
    first.extend([], Rollout([1] * 8, [9], zeros[:1], "stop", 1))
    assert first.routes is None


def test_a_recording_gives_the_routes_again(tmp_path, alone):
    world = dist.World(0, 1, torch.device("cpu"), torch.float32)
    engine = Engine(small(), stop_ids=[3, 7])
    sampling = Sampling(5)
    groups = engine.generate(PROMPTS, 2, sampling, SEEDS)
    recording.Recording(tmp_path, world, 0).add(1, 0, 2, sampling, SEEDS, groups)
    again = recording.Replay(tmp_path, world).generate(PROMPTS, 2, sampling, SEEDS)
    for a, b in zip(flat(groups), flat(again)):
        assert a.ids == b.ids and a.routes.dtype == b.routes.dtype
        assert np.array_equal(a.routes, b.routes)


def test_a_vllm_servers_experts_are_those_of_its_layers_that_have_them(capsys):
    """As vLLM 0.32 writes them: base64 of an .npy file, of all layers, but the last token."""
    config = Config.of(
        {"model_type": "qwen3_moe", **SIZES, **CASES["not normalised, a dense layer"][1]}
    )
    servers = object.__new__(Servers)
    servers.config, servers.warned = config, False
    server = SimpleNamespace(url="http://there")
    given = np.random.default_rng(0).permuted(np.tile(np.arange(16), (6, 3, 1)), axis=-1)
    given = given[:, :, :3].astype(np.uint8)

    def answer(array):
        return {"routed_experts": as_vllm(array)}

    routes = servers._routes(server, answer(given), 7)
    assert routes.dtype == np.int16 and (routes[-1] == -1).all()
    assert (routes[:-1] == given[:, [0, 2]]).all()
    for wrong in (given[1:], given[:, :2], given[:, :, :2], given + 16):
        with pytest.raises(ServerError, match="instead of 16 of .6, 3, 3."):
            servers._routes(server, answer(wrong), 7)
    empty = given.copy()
    empty[2:4] = 0
    with pytest.raises(ServerError, match="named twice for token 2, and for 2 tokens of 6"):
        servers._routes(server, answer(empty), 7)
    for text in ("", "AAAA"):
        with pytest.raises(ServerError, match="experts of another form"):
            servers._routes(server, {"routed_experts": text}, 7)
    assert servers._routes(server, {}, 7) is servers._routes(server, {}, 7) is None
    assert capsys.readouterr().out.count("--enable-return-routed-experts") == 1


class NamesExperts:
    """What a server says over HTTP whose engine rounds, and which names its experts: vLLM does that
    on GPUs only."""

    url = "http://there"

    def __init__(self, model, names=True, completions=False):
        self.model, self.names, self.completions = model, names, completions

    def get(self, path):
        return {"data": [{"id": "served"}]}

    def post(self, path, body, timeout=None):
        tokens_route = "/inference/v1/generate"
        if path != ("/v1/completions" if self.completions else tokens_route):
            raise (Refused if path == tokens_route else ServerError)(f"{self.url}: 404: no {path}")
        if not self.completions and not body["token_ids"]:
            raise Refused(f"{self.url}: 400: no token_ids")
        prompt = body["prompt"] if self.completions else body["token_ids"]
        how = body if self.completions else body["sampling_params"]
        sampling = Sampling(how["max_tokens"], how["temperature"], top_p=how.get("top_p", 1.0))
        ((rollout,),) = Engine(self.model, stop_ids=[]).generate([prompt], 1, sampling)
        pairs = zip(rollout.ids, rollout.logp.tolist())
        content = [{"token_id": i, "logprob": logp} for i, logp in pairs]
        routes_TLA, of_prompt = rollout.routes[:-1], None
        if "prompt_logprobs" in how:
            logp_T, routes_TLA = self.scored(prompt)
            of_prompt = [None, *({str(i): {"logprob": x}} for i, x in zip(prompt[1:], logp_T))]
        choice = {"logprobs": {"content": content, "token_logprobs": rollout.logp.tolist()}}
        choice |= {"token_ids": rollout.ids, "prompt_logprobs": of_prompt}
        if self.names:
            choice["routed_experts"] = as_vllm(routes_TLA.astype(np.uint8))
        return {"choices": [choice], "prompt_logprobs": of_prompt}

    @torch.no_grad()
    def scored(self, ids):
        """-> log-probs of all tokens but the first, and the experts of all."""
        batch, routes = batch_of([probe.example(ids)]), moe.Routes()
        where = batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
        logits_TV = self.model.logits(self.model.model.packed(*where, routes=routes))
        logp_TV = logits_TV.log_softmax(-1)
        return logp_TV[torch.arange(len(ids) - 1), ids[1:]].tolist(), routes.taken_NLA().numpy()


def as_vllm(array) -> str:
    with io.BytesIO() as file:
        np.save(file, array, allow_pickle=False)
        return base64.b64encode(file.getvalue()).decode()


class Worst:
    """Routes of an engine that takes the experts that its router finds worst."""

    def __init__(self, routes):
        self.routes = routes

    def choose(self, number, score_NE, active):
        return self.routes.choose(number, -score_NE, active)


def with_worst(model):
    other = copy.deepcopy(model)
    for mixture in mixtures(other):
        forward = mixture.forward
        mixture.forward = lambda x, routes, f=forward: f(x, Worst(routes))
    return other


def audited(model, server):
    """-> (what differs, the cause, the share of experts that the router would not take)."""
    sequences = [random_ids(n, seed=n) for n in (8, 16, 24)]
    answer = probe.ask(server, sequences, model.config)

    def score(examples, temperature):
        return logprobs(model, examples, 1000, temperature, "cpu")

    own = {name: x.detach() for name, x in model.state_dict().items()}
    prints = {name: probe.print_of(x) for name, x in own.items() if probe.has_print(x)}
    answer.prints, answer.about = prints, {"dtype": "float32"}
    digests = probe.Digests(torch.float32)
    ours = audit.ours_with(model, score, sequences, answer, prints, digests)
    rows = probe.compare(answer, ours, torch.float32)
    cause = attribution.why(answer, ours, torch.float32, model.config, own.items())
    return [what for what, *_ in probe.failed(rows)], cause, ours.changed


@pytest.mark.parametrize("completions", [False, True])
def test_an_audit_takes_the_experts_that_the_server_names(alone, completions):
    """But if they are not those that the trainer's router would choose, it says so."""
    model = replaying(small())
    server = NamesExperts(with_rounding(model), completions=completions)
    bad, cause, changed = audited(model, server)
    assert bad == [] and cause == "" and 0 < changed < probe.CHANGED
    server.names = False
    bad, cause, _ = audited(model, server)
    assert len(bad) == 4 and "start it with --enable-return-routed-experts" in cause
    server = NamesExperts(with_worst(model), completions=completions)
    bad, cause, changed = audited(model, server)
    assert changed > 0.9 and bad == ["experts that the router would not take, share"]
    assert cause == attribution.OTHER_EXPERTS


def _auditor(rank, size, folder):
    store = torch.distributed.FileStore(str(folder / f"audit {size}"), size)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size, store=store)
    model = replaying(small())
    found = audited(model, NamesExperts(with_worst(model)))
    torch.save((found, moe.replayed(model)), folder / f"{rank} of {size}.pt")
    torch.distributed.destroy_process_group()


def test_all_ranks_audit_alike_and_leave_the_counts_of_training(tmp_path):
    """Each rank scores some of the sequences."""
    for size in (1, 2):
        mp.start_processes(_auditor, (size, tmp_path), nprocs=size, start_method="fork")
    names = "0 of 1", "0 of 2", "1 of 2"
    found = [torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in names]
    (whole, counts), *others = found
    assert whole[2] > 0.9 and counts.tolist() == [0, 0]
    for part, counts in others:
        assert part == whole and counts.tolist() == [0, 0]


def test_experts_that_the_router_would_not_take_are_counted(alone):
    """Of the last mixture, which no other router sees."""
    model = replaying(small())
    ids = random_ids(20, 1)
    batch, routes = batch_of([probe.example(ids)]), moe.Routes()
    where = batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
    model.model.packed(*where, routes=routes)
    taken_NLA = routes.taken_NLA().numpy()
    changed = taken_NLA.copy()
    for n, place in ((0, 0), (7, 1), (7, 2), (12, 1)):
        changed[n, -1, place] = min({*range(16)} - {*taken_NLA[n, -1]} - {*changed[n, -1]})
    changed[3] = -1  # the router's own
    changed[9, -1] = changed[9, -1, [1, 2, 0]]  # the same in another order
    for given, counts in ((taken_NLA, [0, 20 * 2 * 3]), (changed, [4, 19 * 2 * 3])):
        example = probe.example(ids, given)
        with torch.no_grad():  # of what is not trained on, only if it is asked for
            model(batch_of([example]))
            with moe.counted(model) as found:
                model(batch_of([example]))
        assert found == counts and moe.replayed(model).tolist() == [0, 0]
        model(batch_of([example]))
        assert moe.replayed(model).tolist() == counts
        found = moe.load_metrics(model)
        assert found["experts/replay_changed"] == counts[0] / counts[1]
        assert moe.replayed(model).tolist() == [0, 0]
    small(seed=1)(batch_of([example]))  # of a model that does not replay
    model(batch_of([probe.example(ids)]))
    assert "experts/replay_changed" not in moe.load_metrics(model)


# ------------------------------------------------------------------------------------- the scripts
TOY = {
    "model_type": "qwen3_moe",
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": True,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random toy model of experts, prompts and a reward."""
    folder = tmp_path_factory.mktemp("moe")
    config = Config.of(TOY)
    model = CausalLM(config).init_weights(0)
    for mixture in mixtures(model):
        mixture.gate.weight.data.mul_(0.01)
    save_model(folder / "toy", model.state_dict().items(), config, toy.tokenizer_files())
    toy.write_rows(folder / "prompts.jsonl", toy.prompt_rows(held_out=False)[:8])
    reward = "def ids(completions, completion_ids, **columns):\n"
    reward += "    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    (folder / "reward.py").write_text(reward)
    return folder


@pytest.fixture
def rounding(monkeypatch):
    """Engines of scripts get a model of their own, whose scores are off by a little."""

    def beside(model, folder, world, tokenizer, rows, tokens, ahead=False):
        return Engine.of(with_rounding(hf.load_model(folder)), tokenizer, rows, tokens)

    monkeypatch.setattr(cli.Engine, "beside", beside)


def script(place, name, out, *more):
    run_here(
        *(name, "--model", place / "toy", "--data", place / "prompts.jsonl", "--holdout", 2),
        *("--out", out, "--steps", 2, "--prompts", 4, "--max_new_tokens", 6, "--lr", 1e-3),
        *("--warmup", 0, "--eval_every", 0, "--device", "cpu", *more),
    )
    return metrics(out)


REWARD = "--reward", "{place}/reward.py:ids", "--group", 3
RUNS = {
    "train_grpo.py": (*REWARD, "--beta", 0.1, "--old_logp", "trainer"),
    "train_ppo.py": REWARD,
    "train_distill.py": ("--teacher", "{place}/toy"),
}


@pytest.mark.parametrize(
    "name",
    [
        "train_grpo.py",
        *(pytest.param(x, marks=pytest.mark.long) for x in [*RUNS][1:]),
    ],
)
def test_scripts_replay_what_their_engine_took(place, rounding, tmp_path, name, capsys):
    """Their gap is that of one policy, though the engine's experts are others. Without replay it is
    not, and the run stops."""
    more = [str(x).format(place=place) for x in RUNS[name]]
    lines = script(place, name, tmp_path / "out", *more)
    assert max(line.get("sampling/sampling_logp_difference/max", 0) for line in lines) <= 1e-4
    assert 0 < lines[-1]["experts/max_violation"] < 8
    assert 0 <= lines[-1]["experts/unused_ratio"] < 1
    assert "experts/unused_ratio" not in lines[0]  # before training
    assert "router_aux_loss_coef 0.001 of config.json is not used" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", ["train_grpo.py", "train_online_dpo.py"])
def test_a_recorded_step_follows_with_the_experts_that_it_names(
    place, rounding, tmp_path, name, request
):
    """In float64, one sequence at a time. With experts of the model's own choice it does not."""
    more = [str(x).format(place=place) for x in RUNS.get(name, REWARD)]
    out = tmp_path / "out"
    script(place, name, out, "--record", "--save_every", 1, "--keep", 9, *more)
    request.getfixturevalue("alone")  # the script has ended its own group
    run = Recorded(out)
    lines = replay.replayed(run, 2)
    assert all(line.holds for line in lines), "\n".join(replay.table(lines))
    for n in (0, 1):
        run.model(n)[0].model.replays = False
    assert not all(line.holds for line in replay.replayed(run, 2))
