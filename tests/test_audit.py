"""The audit (probe.py, attribution.py, audit.py) without a server: planted changes of a small model
are named rightly. tests/test_vllm_audit.py has the same on real servers."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import random_ids, small_model

from nanopost import InputError, StepError, attribution, audit, forward, probe
from nanopost.attribution import cause_of, conclusion
from nanopost.audit import Audit
from nanopost.dist import World
from nanopost.engine import cut
from nanopost.hf import EMBEDDING, HEAD
from nanopost.probe import Answer, Digests, compare, cut_gap, print_of
from nanopost.save import save_model
from nanopost.server import Refused, ServerError

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
LIMIT = probe.PRINT[FP32]
Q, K, V, O = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo")
GATE, UP, DOWN = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
NORM = "model.layers.1.input_layernorm.weight"


@torch.no_grad()
def changed(model, seed: int = 1):
    """A large update of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def state(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def prints(tensors):
    return {name: print_of(x) for name, x in tensors.items()}


MODEL = small_model()
OLD = state(MODEL)
NEW = state(changed(MODEL))
NOW, BEFORE = prints(NEW), prints(OLD)


# ------------------------------------------------------------------------------------------- scores
def test_probes_are_the_same_each_time_and_hold_no_id_that_no_token_has():
    class Tokens:
        def unused_ids(self, size):
            return range(40, size)

    first, again = (probe.probes(Tokens(), 61, 256) for _ in range(2))
    assert first == again
    assert [len(ids) for ids in first] == list(probe.LENGTHS)
    assert 30 < len(set().union(*first)) and max(map(max, first)) < 40
    assert max(map(len, probe.probes(Tokens(), 61, 64))) + probe.SAMPLED == 64


def test_a_gap_leaves_out_the_first_token_of_each_sequence():
    one, other = np.float32([9.0, -1.0, -2.0]), np.float32([0.0, -1.5, -1.0])
    assert probe.gap([one, one[:2]], [other, other[:2]]) == pytest.approx((0.5 + 1.0 + 0.5) / 3)


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9])
def test_the_bounds_of_a_cut_hold_for_it_and_for_few_others(spread, top_p):
    """Beside the engine's own cut, which test_engine.py checks."""
    generator = torch.Generator().manual_seed(0)
    logp_BV = (spread * torch.randn(200, 50, generator=generator)).log_softmax(-1)
    cut_BV = cut(logp_BV, 0, top_p, 0.0)
    ids_B = torch.multinomial(cut_BV.exp(), 1, generator=generator)
    logp_B, cut_B = (x.gather(1, ids_B)[:, 0].numpy() for x in (logp_BV, cut_BV))
    assert cut_gap(cut_B, logp_B, top_p) < 1e-6
    assert cut_gap(logp_B, logp_B, top_p) > 1e-3  # not in the log-probs
    other_B = cut(logp_BV, 0, 0.6 * top_p, 0.0).gather(1, ids_B)[:, 0].numpy()
    kept = np.isfinite(other_B)
    assert cut_gap(other_B[kept], logp_B[kept], top_p) > 1e-2


# ------------------------------------------------------------------------------------------- prints
def in_pairs(x, heads):
    return x.view(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)


def halved(x, heads):
    return x.view(heads, -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


CAUSES = [
    (DOWN, OLD[DOWN], "is that of the version before"),
    (NORM, OLD[NORM], "is that of the version before"),
    (DOWN, torch.cat([NEW[DOWN][:9], OLD[DOWN][9:]]), "has rows 9 to 31 of the version before"),
    (DOWN, 0 * NEW[DOWN], "is zero"),
    (DOWN, 1.1 * NEW[DOWN], "is scaled by 1.1"),
    (NORM, -NEW[NORM], "is scaled by -1"),
    (DOWN, NEW[DOWN] * torch.inf, "is not finite"),
    (DOWN, NEW[DOWN.replace("0", "1")], f"is {DOWN.replace('0', '1')}"),
    (GATE, NEW[UP], f"is {UP}"),
    (O, NEW[O].T, "is transposed"),
    (Q, in_pairs(NEW[Q], 4), "has its rows in the original rotary order"),
    (K, in_pairs(NEW[K], 2), "has its rows in the original rotary order"),
    (K, halved(NEW[K], 2), "has its rows converted to Hugging Face's rotary order twice"),
    (O, in_pairs(NEW[O].T, 4).T, "has its columns in the original rotary order"),
    (V, NEW[V].view(2, 8, -1)[[1, 0]].reshape(16, -1), "has its heads in the order 1 0"),
    (V, NEW[V].flip(0), "has its rows in another order"),
    (V, NEW[V].bfloat16().float(), "is rounded to bfloat16"),
    (
        V,
        NEW[V] + 0.002,
        "differs a little, as by a small update: compare with the weights before (--before)",
    ),
    (V, NEW[V] + 0.2, "holds other numbers"),
    (V, NEW[V][:9], "has 9 rows instead of 16"),
]


@pytest.mark.parametrize("name, tensor, cause", CAUSES, ids=[f"{c[0]} {c[2]}" for c in CAUSES])
def test_a_changed_tensor_is_explained(name, tensor, cause):
    theirs = NOW | {name: print_of(tensor)}
    if len(tensor) == len(NEW[name]):
        assert probe.wrong(theirs, NOW, LIMIT) == [name]
    found = cause_of(name, theirs[name], NOW, BEFORE, MODEL.config, LIMIT, NEW[name])
    assert found.startswith(cause)


def test_what_a_server_rounds_is_not_wrong_at_its_own_precision():
    rounded = {name: print_of(x.bfloat16()) for name, x in NEW.items()}
    as_bf16 = {name: torch.tensor(x).bfloat16().float().numpy() for name, x in rounded.items()}
    assert probe.wrong(as_bf16, rounded, probe.PRINT[BF16]) == []
    assert len(probe.wrong(rounded, NOW, LIMIT)) == len(NOW)
    assert probe.wrong(rounded | {Q: -rounded[Q]}, rounded, probe.PRINT[BF16]) == [Q]


def test_a_stale_tied_head_is_seen_by_its_print():
    tied = {name: x for name, x in NOW.items() if name != HEAD}
    assert probe.wrong(tied | {HEAD: tied[EMBEDDING]}, tied, LIMIT) == []
    assert probe.wrong(tied | {HEAD: BEFORE[EMBEDDING]}, tied, LIMIT) == [HEAD]
    before = {name: x for name, x in BEFORE.items() if name != HEAD}
    cause = cause_of(HEAD, BEFORE[EMBEDDING], tied, before, MODEL.config, LIMIT)
    assert cause == "is that of the version before"


def test_fused_projections_are_taken_apart():
    layer = "model.layers.0.self_attn"
    fused = {
        f"{layer}.qkv_proj.weight": np.arange(64),
        "model.layers.0.mlp.gate_up_proj.weight": np.arange(96),
        "model.norm.weight": np.arange(32),
    }
    found = probe.split(fused, MODEL.config)
    assert {name: x.tolist() for name, x in found.items()} == {
        f"{layer}.q_proj.weight": list(range(32)),
        f"{layer}.k_proj.weight": list(range(32, 48)),
        f"{layer}.v_proj.weight": list(range(48, 64)),
        GATE: list(range(48)),
        UP: list(range(48, 96)),
        "model.norm.weight": list(range(32)),
    }


# Heads of 8, the first 4 of which turn, each with a gate of 8 below it.
HYBRID = changed(small_model(model_type="qwen3_5_text"))
GATED = "model.layers.3.self_attn.q_proj.weight"


def test_rows_of_a_gated_projection_are_taken_apart_and_put_in_order():
    fused = {"model.layers.3.self_attn.qkv_proj.weight": np.arange(96)}
    found = probe.split(fused, HYBRID.config)
    assert [len(x) for x in found.values()] == [64, 16, 16] and found[GATED][-1] == 63
    own = state(HYBRID)
    order = [0, 2, 1, 3, *range(4, 16)]
    pairs = print_of(own[GATED].view(4, 16, 32)[:, order].flatten(0, 1))
    cause = cause_of(GATED, pairs, prints(own), None, HYBRID.config, LIMIT)
    assert cause == "has its rows in the original rotary order (pairs side by side)"


OLD_ONE = "is that of the version before"
NAMES = [*NEW]


@pytest.mark.parametrize(
    "names, causes, clause",
    [
        (NAMES, dict.fromkeys(NAMES, OLD_ONE), "stale weights"),
        (NAMES, dict.fromkeys(NAMES[5:9], OLD_ONE), f"missing, {NAMES[5]} to {NAMES[8]} (4 of"),
        (NAMES, dict.fromkeys([NORM, DOWN], OLD_ONE), f"a partial update: {NORM}, {DOWN} of the v"),
        (NAMES, {HEAD: OLD_ONE}, f"a partial update: {HEAD} of the version before"),
        (NAMES[:-1], {HEAD: OLD_ONE}, "a stale tied head"),
        (NAMES, {GATE: f"is {UP}", UP: f"is {GATE}"}, "gate and up are swapped in model.layers.0"),
        (NAMES, {Q: "is zero", K: "is zero", V: "is transposed"}, f"{Q}, {K} are zero; {V} is tr"),
        (NAMES, dict.fromkeys(NAMES, "is rounded to bfloat16"), "low precision"),
        (NAMES, {V: OLD_ONE, O: OLD_ONE, Q: "is zero"}, f"{V}, {O} are those of the version b"),
        (NAMES, dict.fromkeys([V, O], "has its rows in another order"), f"{O} have their rows in"),
    ],
)
def test_causes_become_one_clause(names, causes, clause):
    assert clause in conclusion(causes, names, names)


# -------------------------------------------------------------------------------------------- bytes
def test_digests_are_those_of_fused_and_padded_weights():
    digests = Digests.of(NEW.items(), FP32)

    def sha(*tensors):
        return hashlib.sha256(torch.cat(tensors).numpy().tobytes()).hexdigest()

    fused = Q.replace("q_proj", "qkv_proj")
    theirs = {
        fused: sha(NEW[Q], NEW[K], NEW[V]),
        GATE.replace("gate", "gate_up"): sha(NEW[GATE], NEW[UP]),
        EMBEDDING: sha(NEW[EMBEDDING], torch.zeros(3, 32)),
        DOWN: sha(NEW[DOWN]),
    }
    assert digests.differ(theirs) == []
    assert digests.differ(theirs | {fused: sha(NEW[Q], NEW[V], NEW[K])}) == [fused]


# ------------------------------------------------------------------------------------------ verdict
SEQUENCES = [random_ids(length, length) for length in (8, 16, 24)]


def score(model, examples=None, temperature=1.0):
    examples = examples or [*map(probe.example, SEQUENCES)]
    return forward.logprobs(model, examples, 512, temperature, CPU)


def answer_of(model, raw=False, uncut=False, **more):
    """What a faithful server with this model's weights would say."""
    sampled, generator = {}, torch.Generator().manual_seed(0)
    for name, (which, top_p) in probe.DRAWN.items():
        ids, logps = [], []
        for _ in range(probe.SAMPLED):
            logits_V = audit.all_logits(model, SEQUENCES[which] + ids, CPU)[-1]
            logp_1V = (logits_V[None] / probe.TEMPERATURE).log_softmax(-1)
            cut_1V = cut(logp_1V, 0, top_p, 0.0)
            ids.append(int(torch.multinomial(cut_1V.exp(), 1, generator=generator)))
            logp_1V = logp_1V if uncut else cut_1V
            logp_1V = logits_V[None].log_softmax(-1) if raw else logp_1V
            logps.append(float(logp_1V[0, ids[-1]]))
        sampled[name] = ids, np.float32(logps)
    return Answer(score(model), sampled, **more)


def judged(answer, model, old=None, dtype=FP32):
    """-> (the comparisons that fail, the cause)."""

    def scores(examples, temperature):
        return score(model, examples, temperature)

    more = {}
    if old is not None:
        more = {"before": prints(state(old)), "scores_before": score(old)}
    digests = Digests.of(state(model).items(), FP32)
    ours = probe.ours_of(scores, SEQUENCES, answer, prints(state(model)), digests, **more)
    rows = compare(answer, ours, dtype)
    bad = [what for what, *_ in probe.failed(rows)]
    return bad, attribution.why(answer, ours, dtype, model.config, state(model).items())


@pytest.fixture(scope="module")
def old():
    return small_model()


@pytest.fixture(scope="module")
def new():
    return changed(small_model())


def test_a_faithful_answer_fails_in_nothing(alone, old, new):
    assert judged(answer_of(new), new, old) == ([], "")
    answer = answer_of(new, prints=prints(state(new)), about={"dtype": "float32"})
    assert judged(answer, new, old) == ([], "")


def test_stale_weights_are_seen_by_the_scores_alone(alone, old, new):
    bad, cause = judged(answer_of(old), new, old)
    assert "log-probs of fixed sequences, nats" in bad
    assert cause == "stale weights: its log-probs are those of the version before"


def test_log_probs_before_the_temperature_or_without_the_cut_are_named(alone, new):
    bad, cause = judged(answer_of(new, raw=True), new)
    assert len(bad) == 3 and "start it with --logprobs-mode processed_logprobs" in cause
    bad, cause = judged(answer_of(new, uncut=True), new)
    assert len(bad) == 1 and "do not contain the cut (top_p)" in cause


def test_stale_keys_and_values_are_named(alone, old, new):
    answer = answer_of(new)
    answer.sampled[probe.CACHED] = answer_of(old).sampled[probe.CACHED]
    assert "stale keys and values" in judged(answer, new)[1]


def test_right_weights_with_wrong_scores_are_not_blamed(alone, old, new):
    """Say another rope_theta, or a lower precision."""
    about = {"dtype": "float32"}
    answer = answer_of(old, prints=prints(state(new)), about=about)
    assert "not the weights" in judged(answer, new)[1]
    answer.about = {"dtype": "bfloat16"}
    assert "low precision: it computes in bfloat16" in judged(answer, new)[1]


def test_bytes_alone_may_differ(alone, new):
    sums = {DOWN: "0", NORM: hashlib.sha256(state(new)[NORM].numpy().tobytes()).hexdigest()}
    bad, cause = judged(answer_of(new, checksums=sums), new)
    assert bad == ["2 tensors' bytes (SHA-256)"] and f"the bytes of {DOWN} differ" in cause
    answer = answer_of(new, checksums=sums, about={"dtype": "bfloat16"})
    assert judged(answer, new)[0] == []


def test_log_probs_that_are_not_numbers_fail(alone, new):
    answer = answer_of(new)
    answer.scores[0][3] = np.nan
    bad, cause = judged(answer, new)
    assert bad and cause == "log-probs that are missing or not finite"


# ----------------------------------------------------------------------------- by scores alone
def swapped(new):
    return new | {GATE: new[UP], UP: new[GATE]}


def of_all_layers(new):
    heads = {"q_proj": 4, "k_proj": 2}
    return new | {
        name: in_pairs(x, heads[name.split(".")[-2]])
        for name, x in new.items()
        if name.split(".")[-2] in heads
    }


SEARCHED = [
    (lambda new, old: old, "stale weights"),
    (lambda new, old: new | {NORM: old[NORM]}, f"a partial update: {NORM} is that of"),
    (
        lambda new, old: new | {n: old[n] for n in [Q, GATE]},
        f"partial update: {GATE}, {Q} of the v",
    ),
    (lambda new, old: new | {n: old[n] for n in [*new][14:]}, "a bucket of weights is missing"),
    (lambda new, old: of_all_layers(new), "all layers have their rows in the original rotary o"),
    (lambda new, old: swapped(new), "gate and up are swapped in model.layers.0"),
    (lambda new, old: new | {O: new[O].T}, f"{O} is transposed"),
    (lambda new, old: new | {DOWN: 0 * new[DOWN]}, f" is zero or {DOWN} is zero"),
    (lambda new, old: new | {DOWN: 2 * new[DOWN]}, f"{UP} is scaled by 2 or {DOWN} is scaled by 2"),
    (lambda new, old: new | {DOWN: new[DOWN].flip(0)}, ""),
]


@pytest.mark.parametrize("fault, clause", SEARCHED)
def test_a_fault_is_found_by_scores_alone(alone, old, new, fault, clause):
    server = small_model()
    server.load_state_dict(fault(state(new), state(old)))
    before = state(new)
    found = attribution.search(new, score(server), lambda: score(new), state(old), 1e-4)
    assert clause in found and bool(clause) == bool(found), found
    assert all(torch.equal(x, before[name]) for name, x in new.state_dict().items())


def test_a_fault_of_a_block_without_attention_is_found_by_scores_alone(alone):
    server = small_model(model_type="qwen3_5_text")
    server.load_state_dict(swapped(state(HYBRID)))
    found = attribution.search(HYBRID, score(server), lambda: score(HYBRID), None, 1e-4)
    assert found == "gate and up are swapped in model.layers.0"


def test_a_stale_tied_head_is_found_by_scores_alone(alone):
    old, new = small_model(tie_word_embeddings=True), changed(small_model(tie_word_embeddings=True))
    server = small_model(tie_word_embeddings=False)
    server.load_state_dict(state(new) | {HEAD: old.model.embed_tokens.weight.detach()})
    found = attribution.search(new, score(server), lambda: score(new), state(old), 1e-4)
    assert found.startswith("a stale tied head")
    assert new.lm_head is None


def test_a_sentence_has_what_where_and_why():
    rows = [("a", 0.0, 1.0), ("b", 2.0, 1.0)]
    assert audit.sentence("http://x", "step 3: ", rows, "stale weights") == (
        "step 3: http://x is not the trainer's policy (b: 2, limit 1): stale weights."
    )
    assert "no explanation that was tried" in audit.sentence("http://x", "", rows, "")


def test_the_model_of_the_command_takes_the_experts_that_a_server_names(tmp_path):
    model = small_model(model_type="qwen3_moe")
    save_model(tmp_path, model.state_dict().items(), model.config)
    command = object.__new__(audit.Command)
    command.device, command.config = CPU, model.config
    assert command.load(tmp_path).model.replays


# ---------------------------------------------------------------------------------------- in a run
class Tokens:
    def unused_ids(self, size):
        return []


@pytest.fixture
def run(alone, monkeypatch):
    """(an Audit of a model, a list of what its servers answer, one each; [] asks none)."""
    model, answers = changed(small_model()), []
    monkeypatch.setattr(audit, "probes", lambda *_: SEQUENCES)
    monkeypatch.setattr(Audit, "_check_tokenizer", lambda *_: None)

    def ask(server, *_):
        if isinstance(answer := answers[int(server.url)], Exception):
            raise answer
        return answer

    monkeypatch.setattr(audit, "ask", ask)
    world = World(0, 1, CPU, FP32)
    return lambda every: Audit(model, Tokens(), world, every), answers


def synced(auditor, answers):
    for _ in auditor.watch(auditor.model.state_dict().items()):
        pass
    auditor.check([SimpleNamespace(url=str(i)) for i in range(len(answers))], 7)


def test_a_run_stops_at_a_server_that_is_not_its_policy(run, old, new):
    make, answers = run
    auditor = make(1)
    answers += [answer_of(new), answer_of(new)]
    synced(auditor, answers)
    answers[1] = answer_of(old, prints=prints(state(old)), about={"dtype": "float32"})
    with pytest.raises(StepError, match="step 7: 1 is not the trainer's policy"):
        synced(auditor, answers)


def test_a_run_names_stale_weights_by_the_prints_of_the_sync_before(run, old, new):
    make, answers = run
    auditor = make(1)
    weights = state(auditor.model)
    auditor.model.load_state_dict(state(old))
    answers.append(answer_of(old))
    synced(auditor, answers)
    auditor.model.load_state_dict(weights)
    late = state(new) | {DOWN: state(old)[DOWN]}
    answers[0] = answer_of(old, prints=prints(late), about={"dtype": "float32"})
    with pytest.raises(StepError, match=f"a partial update: {DOWN} of the version before"):
        synced(auditor, answers)


@pytest.mark.parametrize("every, audited", [(0, []), (1, [0, 1, 2, 3]), (3, [0, 3])])
def test_audits_come_every_so_many_syncs_from_the_first_on(run, every, audited, monkeypatch):
    make, answers = run
    auditor, seen = make(every), []
    monkeypatch.setattr(audit, "ask", lambda *_: seen.append(auditor.count) or answers[0])
    answers.append(answer_of(auditor.model))
    for _ in range(4):
        synced(auditor, answers)
    assert seen == audited


def test_a_server_that_does_not_answer_is_left_to_the_next_rollout(run, new, capsys):
    make, answers = run
    answers += [ServerError("0: no answer in 60 s"), answer_of(new)]
    synced(make(1), answers)
    assert "warning: not audited: 0: no answer in 60 s" in capsys.readouterr().out
    answers[0] = Refused("0: no such id")
    with pytest.raises(InputError, match="no such id"):
        synced(make(1), answers)
