"""PPO: GAE, whitening, value loss and KL control against brute force, and train_ppo.py against a slow twin.

The twin is written here in loops over padded sequences, one at a time, on transformers' models: it shares no line with
train_ppo.py but the engine, which draws the same rollouts again.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scripts import metrics, run
from small import random_ids, small_config

from nanopost import advantages, dist, hf, losses, optim, packing
from nanopost.batch import Example, add_column, batch_of, padded
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.model import ActorCritic
from nanopost.tokenizer import Tokenizer
from runs import toy

PROMPTS, EPOCHS, MINIBATCHES, SEED, TEMPERATURE, NEW, LR = 8, 2, 2, 4, 1.2, 6, 2e-3
BETA, GAMMA, LAM, LOW, HIGH, VALUE_CLIP, VALUE_COEF = 0.3, 0.97, 0.8, 0.1, 0.15, 0.05, 0.7
REWARD = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text[0]["content"]) / 4 - 0.5 for text in completions]
"""


# --------------------------------------------------------------------------------------------------- pure functions
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (0.97, 1.0)])
def test_gae_is_the_sum_of_its_definition_whatever_stands_behind_shorter_rows(gamma, lam):
    draw, lengths = np.random.default_rng(0), (5, 1, 3)
    reward_BT, value_BT = (
        torch.zeros(3, 5, dtype=torch.float64),
        torch.zeros(3, 5, dtype=torch.float64),
    )
    for b, n in enumerate(lengths):
        reward_BT[b, :n], value_BT[b, :n] = torch.from_numpy(draw.normal(size=(2, n)))
    adv_BT, return_BT = advantages.gae(reward_BT, value_BT, gamma, lam)
    for b, n in enumerate(lengths):
        r, v = reward_BT[b].tolist(), [*value_BT[b, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        assert adv_BT[b, :n].tolist() == pytest.approx(expected, abs=1e-14)
        assert return_BT[b, :n].tolist() == pytest.approx(
            [a + x for a, x in zip(expected, v)], abs=1e-14
        )
        if lam == 1.0:
            monte_carlo = [sum(gamma**k * r[t + k] for k in range(n - t)) for t in range(n)]
            assert return_BT[b, :n].tolist() == pytest.approx(monte_carlo, abs=1e-14)


def test_gae_with_the_true_values_has_no_mean_in_any_state():
    """Every sequence of a policy of two tokens, enumerated: E[adv | state] = 0 for any lambda, and with the token
    given it is Q - V."""
    draw, steps = np.random.default_rng(1), 3
    p = {
        s: draw.uniform(0.2, 0.8) for n in range(steps) for s in itertools.product((0, 1), repeat=n)
    }
    reward = {
        s: draw.normal() for n in range(1, steps + 1) for s in itertools.product((0, 1), repeat=n)
    }

    def value(s):
        return (
            0.0
            if len(s) == steps
            else sum(
                (p[s] if token else 1 - p[s]) * (reward[(*s, token)] + value((*s, token)))
                for token in (0, 1)
            )
        )

    paths = list(itertools.product((0, 1), repeat=steps))
    weight = [
        math.prod(p[path[:t]] if path[t] else 1 - p[path[:t]] for t in range(steps))
        for path in paths
    ]
    reward_BT = torch.tensor(
        [[reward[path[: t + 1]] for t in range(steps)] for path in paths], dtype=torch.float64
    )
    value_BT = torch.tensor(
        [[value(path[:t]) for t in range(steps)] for path in paths], dtype=torch.float64
    )
    adv_BT, _ = advantages.gae(reward_BT, value_BT, 1.0, 0.6)
    for t in range(steps):
        for state in itertools.product((0, 1), repeat=t):
            found = {
                token: [
                    (w, float(a))
                    for w, a, path in zip(weight, adv_BT[:, t], paths)
                    if path[: t + 1] == (*state, token)
                ]
                for token in (0, 1)
            }
            mean = {
                token: sum(w * a for w, a in of) / sum(w for w, _ in of)
                for token, of in found.items()
            }
            assert (1 - p[state]) * mean[0] + p[state] * mean[1] == pytest.approx(0, abs=1e-12)
            after = (*state, 1)
            assert mean[1] == pytest.approx(reward[after] + value(after) - value(state), abs=1e-12)


def test_value_loss_and_its_gradient_are_those_of_a_loop():
    draw = np.random.default_rng(0)
    value, old, target = (torch.from_numpy(draw.normal(size=40)) for _ in range(3))
    mask_N = torch.from_numpy(draw.random(40) < 0.7)
    value_N = value.clone().requires_grad_()
    loss, counts = losses.value_loss(value_N, old, target, mask_N, 0.3)
    loss.backward()
    total, clipped_tokens, slope = 0.0, 0, []
    for v, o, r, m in zip(value.tolist(), old.tolist(), target.tolist(), mask_N.tolist()):
        clipped = o + min(0.3, max(-0.3, v - o))
        free, bound = (v - r) ** 2, (clipped - r) ** 2
        total += m * max(free, bound) / 2
        clipped_tokens += m and bound > free
        slope.append(m * (v - r if free >= bound else (clipped - r) * (abs(v - o) < 0.3)))
    assert float(loss) == pytest.approx(total, rel=1e-12) and 3 < clipped_tokens == int(
        counts["val/clipfrac_avg"]
    )
    assert value_N.grad.tolist() == pytest.approx(slope, abs=1e-12)


def test_the_weight_of_the_kl_follows_its_error_and_no_further_than_a_fifth_of_it():
    assert advantages.adapted(0.5, kl=6.0, target=6.0) == 0.5
    assert advantages.adapted(0.5, kl=6.6, target=6.0) == pytest.approx(0.5 * 1.01)
    assert advantages.adapted(0.5, kl=60.0, target=6.0) == pytest.approx(0.5 * 1.02)
    assert advantages.adapted(0.5, kl=0.0, target=6.0) == pytest.approx(0.5 * 0.98)


def test_mean_and_std_and_columns_there_and_back(alone):
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 50
    assert dist.mean_and_std(x) == pytest.approx(
        (float(x.double().mean()), float(x.double().std())), rel=1e-9
    )
    examples = [
        Example([1, 2, 3, 4], [False, False, True, True], {"a": np.array([9, 9, 1.5, 2.5])}),
        Example([1, 2], [False, True], {"a": np.array([9, 3.5])}),
    ]
    x_BT = padded(examples, "a")
    assert x_BT.tolist() == [[1.5, 2.5], [3.5, 0]]
    add_column(examples, "b", x_BT)
    assert [e.columns["b"].tolist() for e in examples] == [[0, 0, 1.5, 2.5], [0, 3.5]]


def test_a_part_of_the_model_learns_at_a_rate_of_its_own():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("policy", "value")})
    optimizer = optim.adamw(model, 0.0, (0.9, 0.95), value=5.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optim.set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = 5e-3 if name.startswith("value") else 1e-3
        assert (before[name] - p.detach()).flatten().tolist() == pytest.approx(
            [moved] * p.numel(), rel=1e-3
        )


# ------------------------------------------------------------------------------------------------ values of a model
@pytest.mark.parametrize("own", [True, False])
def test_values_are_of_what_stands_before_a_token_and_alone_they_leave_the_policy_be(own):
    config = small_config()
    model = ActorCritic(config, config.with_scalar_head(None) if own else None)
    for seed, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(seed))
    ids = random_ids(9, 0)
    example = Example(ids, np.arange(9) >= 4)
    with torch.no_grad():
        _, _, value_N = model(batch_of([Example([7, 8], [False, True]), example]))
        value_T = value_N[2:].roll(1)  # at the tokens themselves
        for t in range(4, 9):  # whatever is chosen at t or comes later
            changed = Example([*ids[:t], *random_ids(9 - t, t + 1)], np.arange(9) >= 4)
            assert model(batch_of([changed]))[2].roll(1)[t] == pytest.approx(
                float(value_T[t]), abs=1e-5
            )
        assert not value_T[:4].any() and len({round(float(v), 4) for v in value_T[4:]}) == 5
    logp_N, _, value_N = model(batch_of([example]), value_alone=True)
    value_N.sum().backward()
    assert logp_N is None and all(p.grad is None for p in model.policy.parameters())
    assert (
        model.value.weight.grad.any()
        if not own
        else model.value.model.layers[0].mlp.up_proj.weight.grad.any()
    )


# ------------------------------------------------------------------------------------------------------ the slow twin
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{3 * a}=?"}]} for a in range(2, 12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("train_sft.py", "--out", folder / "sft", "--steps", 12, "--rows", 16, "--save_every", 0)
    pairs = [
        {
            **row,
            **{
                side: [{"role": "assistant", "content": text}]
                for side, text in (
                    ("chosen", "<answer>12</answer>"),
                    ("rejected", f"<answer>{a}</answer>"),
                )
            },
        }
        for a, row in enumerate(rows)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run(
        "train_rm.py",
        "--model",
        folder / "sft",
        "--data",
        folder / "pairs.jsonl",
        "--holdout",
        2,
        "--out",
        folder / "rm",
        "--steps",
        8,
        "--rows",
        4,
        "--lr",
        3e-3,
        "--save_every",
        0,
    )
    return folder


def ppo(place, out, *more, data_file="prompts.jsonl"):
    return (
        "--model",
        place / "sft",
        "--data",
        place / data_file,
        "--eval_data",
        place / data_file,
        "--out",
        out,
        "--prompts",
        PROMPTS,
        "--max_new_tokens",
        NEW,
        "--temperature",
        TEMPERATURE,
        "--seed",
        SEED,
        "--lr",
        LR,
        "--schedule",
        "constant",
        "--warmup",
        0,
        "--ppo_epochs",
        EPOCHS,
        "--minibatches",
        MINIBATCHES,
        "--steps",
        1,
        "--save_every",
        0,
        "--tokens",
        60,
        "--reward",
        f"{place}/reward.py:digits",
        *more,
    )


LIKE_THE_TWIN = (
    "--beta",
    BETA,
    "--gamma",
    GAMMA,
    "--lam",
    LAM,
    "--clip_low",
    LOW,
    "--clip_high",
    HIGH,
    "--value_clip",
    VALUE_CLIP,
    "--value_coef",
    VALUE_COEF,
    "--eos_penalty",
    0.25,
)


def twin(place, own: bool, kl_in: str, kl: str):
    """Two rollout batches of PPO in fp32, sequence by sequence -> (metrics of the second, policy, value model or head).

    In the first the policy is its own reference; in the second it has moved away from it.
    """
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "sft")
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()]
    engine = Engine(hf.load_model(place / "sft"), Tokenizer.load(place / "sft").stop_ids)
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(place / "sft", dtype=torch.float32)
        for _ in range(2)
    )
    if own:
        critic = transformers.AutoModelForSequenceClassification.from_pretrained(
            place / "rm", dtype=torch.float32
        )
        backbone, head = critic.model, critic.score
    else:
        backbone, head = policy.model, torch.nn.Linear(policy.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(head.weight)
    estimate = {
        "k1": lambda x: x,
        "k3": lambda x: math.exp(-x) - 1 + x,
        "k3 of a tensor": lambda x: (-x).exp() - 1 + x,
    }
    trained = torch.nn.ModuleList([policy, critic if own else head])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)

    def judged(model, rollout):
        """log-prob of each sampled token and the value of the state before it."""
        ids = torch.tensor([rollout.prompt + rollout.ids])
        logits = model(ids).logits[0] / TEMPERATURE
        values = head(backbone(ids).last_hidden_state[0])[:, 0]
        at = [len(rollout.prompt) - 1 + t for t in range(len(rollout.ids))]
        logp = torch.stack([logits[i].log_softmax(-1)[token] for i, token in zip(at, rollout.ids)])
        return logp, values[at]

    for step in (1, 2):
        engine.model.load_state_dict(policy.state_dict(), strict=False)
        prompts = [
            tokenizer.apply_chat_template(
                rows[i]["prompt"], add_generation_prompt=True, return_dict=False
            )
            for i in packing.take(len(rows), SEED, (step - 1) * PROMPTS, PROMPTS)
        ]
        seeds = [prompt_seed(SEED, (step - 1) * PROMPTS + serial) for serial in range(PROMPTS)]
        flat = [r for (r,) in engine.generate(prompts, 1, Sampling(NEW, TEMPERATURE), seeds)]
        assert (
            step == 2 or len({len(r.ids) for r in flat}) > 2 and len({r.finish for r in flat}) == 2
        )
        rollouts = []
        for r in flat:
            with torch.no_grad():
                old, value = (x.double().tolist() for x in judged(policy, r))
                ref = judged(reference, r)[0]
            text = tokenizer.decode(r.ids, skip_special_tokens=True)
            score = sum(c.isdigit() for c in text) / 4 - 0.5 - 0.25 * (r.finish == "length")
            penalty = [
                -BETA * estimate[kl](a - b) * (kl_in == "reward")
                for a, b in zip(old, ref.double().tolist())
            ]
            reward = [*penalty[:-1], penalty[-1] + score]
            adv, later = [0.0] * len(old), 0.0
            for t in reversed(range(len(old))):
                after = value[t + 1] if t + 1 < len(old) else 0.0
                later = reward[t] + GAMMA * after - value[t] + GAMMA * LAM * later
                adv[t] = later
            monte_carlo = [
                sum(GAMMA ** (k - t) * reward[k] for k in range(t, len(old)))
                for t in range(len(old))
            ]
            rollouts.append(
                dict(
                    rollout=r,
                    old=old,
                    ref=ref,
                    value=value,
                    adv=adv,
                    score=score,
                    penalty=sum(penalty),
                    monte_carlo=monte_carlo,
                    returns=[a + v for a, v in zip(adv, value)],
                )
            )
        every = np.concatenate([r["adv"] for r in rollouts])
        truth, guess = (
            np.concatenate([r[name] for r in rollouts]) for name in ("monte_carlo", "value")
        )
        found = {
            "objective/scores": np.mean([r["score"] for r in rollouts]),
            "objective/kl": np.mean(
                [sum(r["old"]) - float(r["ref"].double().sum()) for r in rollouts]
            ),
            "objective/non_score_reward": np.mean([r["penalty"] for r in rollouts]),
            "val/explained_variance": 1 - np.var(truth - guess) / np.var(truth),
        }
        sums = dict.fromkeys(
            ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg"), 0.0
        )
        tokens = 0
        for epoch in range(EPOCHS):
            order = np.random.default_rng((SEED, step, epoch)).permutation(PROMPTS)
            for part in np.array_split(order, MINIBATCHES):
                total, count = 0.0, sum(len(rollouts[i]["old"]) for i in part)
                for i in part:
                    r = rollouts[i]
                    logp, values = judged(policy, r["rollout"])
                    for t in range(len(r["old"])):
                        adv = (r["adv"][t] - every.mean()) / (every.std(ddof=1) + 1e-8)
                        ratio = (logp[t] - r["old"][t]).exp()
                        clipped = ratio.clamp(1 - LOW, 1 + HIGH)
                        policy_loss = -torch.min(ratio * adv, clipped * adv)
                        near = values[t].clamp(
                            r["value"][t] - VALUE_CLIP, r["value"][t] + VALUE_CLIP
                        )
                        errors = (values[t] - r["returns"][t]) ** 2, (near - r["returns"][t]) ** 2
                        value_loss = 0.5 * torch.max(*errors)
                        total = total + (policy_loss + VALUE_COEF * value_loss) / count
                        if kl_in == "loss":
                            total = (
                                total
                                + BETA
                                * estimate[f"{kl} of a tensor"](logp[t] - r["ref"][t])
                                / count
                            )
                        sums["loss/policy_avg"] += float(policy_loss)
                        sums["loss/value_avg"] += float(value_loss)
                        sums["policy/clipfrac_avg"] += float(ratio * adv > clipped * adv)
                        sums["val/clipfrac_avg"] += float(errors[1] > errors[0])
                total.backward()
                found["grad_norm"] = float(
                    torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                )
                optimizer.step(), optimizer.zero_grad()
                tokens += count
    return (
        {**found, **{name: value / tokens for name, value in sums.items()}},
        policy,
        critic if own else head,
    )


@pytest.mark.parametrize("own, kl_in, kl", [(True, "reward", "k1"), (False, "loss", "k3")])
def test_two_rollout_batches_of_train_ppo_are_those_of_a_slow_twin(place, tmp_path, own, kl_in, kl):
    """Each of two epochs of two minibatches, packed in micro-batches of 60 tokens, with a KL, clipping of ratios and
    values, and an end penalty: metrics, and every weight to a fiftieth of what Adam moved it by."""
    run(
        "train_ppo.py",
        *ppo(
            place,
            tmp_path,
            *LIKE_THE_TWIN,
            "--value_model",
            place / "rm" if own else "head",
            "--kl_in",
            kl_in,
            "--kl",
            kl,
            "--steps",
            2,
        ),
    )
    ours = metrics(tmp_path)[-1]
    theirs, policy, critic = twin(place, own, kl_in, kl)
    print({name: (ours[name], value) for name, value in theirs.items()})
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name
    assert (
        theirs["policy/clipfrac_avg"] > 0.02
        and theirs["val/clipfrac_avg"] > 0.02
        and theirs["objective/kl"] > 0.01
    )
    before = dict(hf.load_model(place / "sft").named_parameters())
    moved = dict(policy.named_parameters())
    for name, p in hf.load_model(tmp_path).named_parameters():
        gap, size = (p - moved[name]).detach().abs(), (before[name] - moved[name]).detach().abs()
        assert gap.mean() < 0.02 * size.mean(), name
    if own:
        value = dict(hf.load_scalar_model(tmp_path / "value").named_parameters())
        assert all(
            (p - value[name]).abs().mean() < 2e-2 * LR for name, p in critic.named_parameters()
        )


def test_ppo_on_two_ranks_is_ppo_on_one(place, tmp_path):
    """Scores scaled and rewards whitened, which are statistics over ranks; the reward model as reward and as value."""
    flags = (
        *LIKE_THE_TWIN,
        "--score_scale",
        "--whiten_rewards",
        "--steps",
        3,
        "--group",
        2,
        "--kl_target",
        0.1,
        "--value_warmup",
        1,
        "--value_lr",
        5e-3,
        "--reward",
        f"model:{place}/rm",
    )
    for ranks in (0, 2):
        run("train_ppo.py", *ppo(place, tmp_path / str(ranks), *flags), ranks=ranks)
    one, two = (metrics(tmp_path / str(ranks)) for ranks in (0, 2))
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"time/rollout", "time/step", "tokens_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4), (a["step"], name)
    assert (
        "policy/approxkl_avg" not in one[1]
        and one[2]["beta"] == one[1]["beta"] == BETA != one[3]["beta"]
    )
    assert one[3]["objective/kl"] > 0.01
    names = dict(hf.load_model(tmp_path / "0").named_parameters())
    for name, p in hf.load_model(tmp_path / "2").named_parameters():
        assert (p - names[name]).abs().max() < LR / 10, name


def test_the_value_model_learns_alone_first_and_work_stops_where_the_kl_does(place, tmp_path):
    run("train_ppo.py", *ppo(place, tmp_path / "warm", "--value_warmup", 1))
    before = dict(hf.load_model(place / "sft").named_parameters())
    assert all(
        torch.equal(p, before[name])
        for name, p in hf.load_model(tmp_path / "warm").named_parameters()
    )
    assert metrics(tmp_path / "warm")[-1]["updates"] == EPOCHS * MINIBATCHES
    begun = dict(hf.load_model(place / "sft").named_parameters())
    value = hf.load_scalar_model(tmp_path / "warm" / "value").named_parameters()
    assert all((p - begun[name]).abs().mean() > LR / 2 for name, p in value if "mlp" in name)
    run("train_ppo.py", *ppo(place, tmp_path / "stop", "--kl_stop", 1e-9))
    assert metrics(tmp_path / "stop")[-1]["updates"] == 1


def test_a_killed_run_of_ppo_ends_with_the_same_weights(place, tmp_path):
    """Cut where the value model alone has learnt, so that the policy has no moments yet."""
    flags = (
        "--steps",
        3,
        "--save_every",
        1,
        "--score_scale",
        "--kl_target",
        1.0,
        "--beta",
        0.1,
        "--value_warmup",
        1,
    )
    run("train_ppo.py", *ppo(place, tmp_path / "whole", *flags))
    run("train_ppo.py", *ppo(place, tmp_path / "cut", *flags, "--steps", 2))
    (tmp_path / "cut" / "config.json").unlink()
    run("train_ppo.py", *ppo(place, tmp_path / "cut", *flags, "--resume"))
    for name in ("model.safetensors", "value/model.safetensors"):
        whole, cut = ((tmp_path / run_ / name).read_bytes() for run_ in ("whole", "cut"))
        assert whole == cut, name
    last = metrics(tmp_path / "cut")[3]
    assert abs(last["objective/kl"]) > 0.01 and last["beta"] == pytest.approx(
        0.1 * (1 - 0.2 * 0.1)
    )  # adapted once
    more = (
        "--steps",
        4,
        "--beta",
        0.4,
        "--resume",
    )  # a beta that was not there before is the one that counts
    run("train_ppo.py", *ppo(place, tmp_path / "cut", *flags, *more))
    assert metrics(tmp_path / "cut")[3]["beta"] == 0.4


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--kl_target", 3), "--kl_target adapts --beta: give it a first value above 0"),
        (
            ("--prompts", 5),
            "--prompts 5 does not divide into 1 ranks x 2 minibatches: 4 or 6 would",
        ),
        (("--temperature", 0), "--temperature 0.0: training samples"),
        (("--value_model", "nowhere"), "nowhere is no folder"),
        (("--lr", 0, "--value_lr", 1e-3), "--value_lr beside --lr 0"),
    ],
)
def test_what_cannot_be_trained_says_so(place, tmp_path, flags, sentence):
    assert sentence in run("train_ppo.py", *ppo(place, tmp_path, *flags), ok=False).stderr


def test_the_toy_is_the_default(place):
    assert toy.prompt_rows(held_out=True)
    assert "--value_model FOLDER" in run("train_ppo.py", "--help").stdout
