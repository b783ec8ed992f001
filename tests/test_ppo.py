"""PPO: GAE, whitening and value loss against brute force, and train_ppo.py against a slow twin.

The twin is written here in loops over sequences, one at a time, on transformers' models: it shares
no line with train_ppo.py but the engine, which draws the same rollouts again.
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


# ----------------------------------------------------------------------------------- pure functions
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (0.97, 1.0)])
def test_gae_is_the_sum_of_its_definition_whatever_follows_shorter_rows(gamma, lam):
    draw, lengths = np.random.default_rng(0), (5, 1, 3)
    reward_BT = torch.zeros(3, 5, dtype=torch.float64)
    value_BT = torch.zeros(3, 5, dtype=torch.float64)
    for b, n in enumerate(lengths):
        reward_BT[b, :n], value_BT[b, :n] = torch.from_numpy(draw.normal(size=(2, n)))
    adv_BT, return_BT = advantages.gae(reward_BT, value_BT, gamma, lam)
    for b, n in enumerate(lengths):
        r, v = reward_BT[b].tolist(), [*value_BT[b, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        returns = [a + x for a, x in zip(expected, v)]
        assert adv_BT[b, :n].tolist() == pytest.approx(expected, abs=1e-14)
        assert return_BT[b, :n].tolist() == pytest.approx(returns, abs=1e-14)
        if lam == 1.0:
            monte_carlo = [sum(gamma**k * r[t + k] for k in range(n - t)) for t in range(n)]
            assert return_BT[b, :n].tolist() == pytest.approx(monte_carlo, abs=1e-14)


def test_gae_with_the_true_values_has_no_mean_in_any_state():
    """Every sequence of a policy of two tokens, enumerated: E[adv | state] = 0 for any lambda, and
    with the token given it is Q - V."""
    draw, steps = np.random.default_rng(1), 3
    states = [s for n in range(steps + 1) for s in itertools.product((0, 1), repeat=n)]
    p = {s: draw.uniform(0.2, 0.8) for s in states if len(s) < steps}  # of token 1
    reward = {s: draw.normal() for s in states if s}

    def chance(s, token):
        return p[s] if token else 1 - p[s]

    def q(s, token):
        after = (*s, token)
        return reward[after] + value(after)

    def value(s):
        if len(s) == steps:
            return 0.0
        return sum(chance(s, token) * q(s, token) for token in (0, 1))

    paths = [s for s in states if len(s) == steps]
    weight = [math.prod(chance(s[:t], s[t]) for t in range(steps)) for s in paths]
    reward_BT = [[reward[s[: t + 1]] for t in range(steps)] for s in paths]
    value_BT = [[value(s[:t]) for t in range(steps)] for s in paths]
    adv_BT, _ = advantages.gae(
        torch.tensor(reward_BT, dtype=torch.float64),
        torch.tensor(value_BT, dtype=torch.float64),
        gamma=1.0,
        lam=0.6,
    )
    for s in p:
        t, mean = len(s), {}
        for token in (0, 1):
            through = [b for b, path in enumerate(paths) if path[: t + 1] == (*s, token)]
            total = sum(weight[b] * float(adv_BT[b, t]) for b in through)
            mean[token] = total / sum(weight[b] for b in through)
            assert mean[token] == pytest.approx(q(s, token) - value(s), abs=1e-12)
        assert (1 - p[s]) * mean[0] + p[s] * mean[1] == pytest.approx(0, abs=1e-12)


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
    optimizer = optim.adamw(model, 0.0, value=5.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optim.set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = 5e-3 if name.startswith("value") else 1e-3
        change = (before[name] - p.detach()).flatten().tolist()
        assert change == pytest.approx([moved] * p.numel(), rel=1e-3)


# -------------------------------------------------------------------------------- values of a model
@pytest.mark.parametrize("own", [True, False])
def test_values_are_of_what_precedes_a_token_and_alone_they_leave_the_policy_be(own):
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
    weight = model.value.model.layers[0].mlp.up_proj.weight if own else model.value.weight
    assert weight.grad.any()


# ------------------------------------------------------------------------------------ the slow twin
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a short SFT run of the toy (sft), a reward model of it (rm), prompts, and a
    reward file."""
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "reward.py").write_text(REWARD)
    toy.write_model(folder / "model")
    toy.write_rows(folder / "rows.jsonl", toy.sft_rows()[:1000])
    quiet = ("--save_every", 0, "--eval_every", 0)
    flags = ("--steps", 12, "--rows", 16, "--lr", 3e-3, *quiet)
    data = ("--model", folder / "model", "--data", folder / "rows.jsonl")
    run("train_sft.py", *data, "--out", folder / "sft", *flags)
    prompts, pairs = [], []
    for a in range(2, 12):
        row = {"prompt": [{"role": "user", "content": f"{a}+{3 * a}=?"}]}
        chosen = [{"role": "assistant", "content": "<answer>12</answer>"}]
        rejected = [{"role": "assistant", "content": f"<answer>{a - 2}</answer>"}]
        prompts.append(row)
        pairs.append({**row, "chosen": chosen, "rejected": rejected})
    toy.write_rows(folder / "prompts.jsonl", prompts)
    toy.write_rows(folder / "pairs.jsonl", pairs)
    flags = ("--steps", 8, "--rows", 4, "--lr", 3e-3, "--holdout", 2, *quiet)
    data = ("--model", folder / "sft", "--data", folder / "pairs.jsonl")
    run("train_rm.py", *data, "--out", folder / "rm", *flags)
    return folder


def ppo(place, out, *more):
    data = ("--data", place / "prompts.jsonl", "--eval_data", place / "prompts.jsonl")
    sampling = ("--prompts", PROMPTS, "--max_new_tokens", NEW, "--temperature", TEMPERATURE)
    updates = ("--ppo_epochs", EPOCHS, "--minibatches", MINIBATCHES, "--lr", LR, "--warmup", 0)
    length = ("--steps", 1, "--save_every", 0, "--tokens", 60, "--seed", SEED)
    reward = ("--reward", f"{place}/reward.py:digits")
    return (
        *("--model", place / "sft", "--out", out, *data),
        *(*sampling, *updates, *length, *reward, *more),
    )


LIKE_THE_TWIN = (
    *("--beta", BETA, "--gamma", GAMMA, "--lam", LAM, "--clip", LOW, HIGH),
    *("--value_clip", VALUE_CLIP, "--value_coef", VALUE_COEF, "--eos_penalty", 0.25),
)


def twin(place, own: bool, kl_in: str, kl: str):
    """Two rollout batches of PPO in fp32, sequence by sequence -> (metrics of the second, policy,
    value model or head).

    In the first the policy is its own reference; in the second it has moved away from it. kl_in:
    "reward", or "loss", which a fork has.
    """
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "sft")
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()]
    engine = Engine.of(hf.load_model(place / "sft"), Tokenizer.load(place / "sft"))
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

    def credited(rollout):
        """A rollout with all that is known of it before the first update."""
        with torch.no_grad():
            old, value = (x.double().tolist() for x in judged(policy, rollout))
            ref = judged(reference, rollout)[0].double().tolist()
        length = len(old)
        text = tokenizer.decode(rollout.ids, skip_special_tokens=True)
        score = sum(c.isdigit() for c in text) / 4 - 0.5 - 0.25 * (rollout.finish == "length")
        penalty = [0.0] * length
        if kl_in == "reward":
            penalty = [-BETA * estimate[kl](a - b) for a, b in zip(old, ref)]
        reward = [*penalty[:-1], penalty[-1] + score]
        adv, later = [0.0] * length, 0.0
        for t in reversed(range(length)):
            after = value[t + 1] if t + 1 < length else 0.0
            later = reward[t] + GAMMA * after - value[t] + GAMMA * LAM * later
            adv[t] = later
        monte_carlo = []
        for t in range(length):
            monte_carlo.append(sum(GAMMA ** (k - t) * reward[k] for k in range(t, length)))
        return dict(
            rollout=rollout,
            old=old,
            ref=ref,
            value=value,
            adv=adv,
            score=score,
            penalty=sum(penalty),
            monte_carlo=monte_carlo,
            returns=[a + v for a, v in zip(adv, value)],
        )

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
        if step == 1:
            assert len({len(r.ids) for r in flat}) > 2 and len({r.finish for r in flat}) == 2
        rollouts = [credited(r) for r in flat]
        every = np.concatenate([r["adv"] for r in rollouts])
        truth = np.concatenate([r["monte_carlo"] for r in rollouts])
        guess = np.concatenate([r["value"] for r in rollouts])
        found = {
            "objective/scores": np.mean([r["score"] for r in rollouts]),
            "objective/kl": np.mean([sum(r["old"]) - sum(r["ref"]) for r in rollouts]),
            "objective/non_score_reward": np.mean([r["penalty"] for r in rollouts]),
            "val/explained_variance": 1 - np.var(truth - guess) / np.var(truth),
        }
        sums = dict.fromkeys(
            ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg"), 0.0
        )
        tokens = 0
        for group in optimizer.param_groups:
            group["lr"] = LR * (1.0, 0.5)[step - 1]  # linear to 0 over two rollout batches
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
                        old = r["value"][t]
                        near = values[t].clamp(old - VALUE_CLIP, old + VALUE_CLIP)
                        errors = (values[t] - r["returns"][t]) ** 2, (near - r["returns"][t]) ** 2
                        value_loss = 0.5 * torch.max(*errors)
                        total = total + (policy_loss + VALUE_COEF * value_loss) / count
                        if kl_in == "loss":
                            kl_t = estimate[f"{kl} of a tensor"](logp[t] - r["ref"][t])
                            total = total + BETA * kl_t / count
                        sums["loss/policy_avg"] += float(policy_loss)
                        sums["loss/value_avg"] += float(value_loss)
                        sums["policy/clipfrac_avg"] += float(ratio * adv > clipped * adv)
                        sums["val/clipfrac_avg"] += float(errors[1] > errors[0])
                total.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                found["grad_norm"] = float(norm)
                optimizer.step()
                optimizer.zero_grad()
                tokens += count
    means = {name: value / tokens for name, value in sums.items()}
    return {**found, **means}, policy, critic if own else head


def check_against_the_twin(place, out, own, kl_in, kl):
    """A run of two rollout batches in `out` is the twin's: metrics, and every weight to a fiftieth
    of what Adam moved it by."""
    ours = metrics(out)[-1]
    theirs, policy, critic = twin(place, own, kl_in, kl)
    print({name: (ours[name], value) for name, value in theirs.items()})
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name
    assert theirs["policy/clipfrac_avg"] > 0.02 and theirs["val/clipfrac_avg"] > 0.02
    assert theirs["objective/kl"] > 0.01
    before = dict(hf.load_model(place / "sft").named_parameters())
    moved = dict(policy.named_parameters())
    for name, p in hf.load_model(out).named_parameters():
        gap, size = (p - moved[name]).detach().abs(), (before[name] - moved[name]).detach().abs()
        assert gap.mean() < 0.02 * size.mean(), name
    if own:
        value = dict(hf.load_scalar_model(out / "value").named_parameters())
        for name, p in critic.named_parameters():
            assert (p - value[name]).abs().mean() < 2e-2 * LR, name


@pytest.mark.slow
@pytest.mark.parametrize("own, kl", [(True, "k1"), (False, "k3")])
def test_two_rollout_batches_of_train_ppo_are_those_of_a_slow_twin(place, tmp_path, own, kl):
    """Each of two epochs of two minibatches, packed in micro-batches of 60 tokens, with a KL in the
    reward, clipping of ratios and values, and a penalty for answers without an end."""
    value_model = place / "rm" if own else "head"
    flags = (*LIKE_THE_TWIN, "--value_model", value_model, "--kl", kl, "--steps", 2)
    run("train_ppo.py", *ppo(place, tmp_path, *flags))
    check_against_the_twin(place, tmp_path, own, "reward", kl)


@pytest.mark.slow
def test_ppo_on_two_ranks_is_ppo_on_one(place, tmp_path):
    """Scores scaled and rewards whitened, which are statistics over ranks; the reward model as
    reward and as value."""
    flags = (
        *(*LIKE_THE_TWIN, "--score_scale", "--whiten_rewards", "--steps", 3, "--group", 2),
        *("--value_warmup", 1, "--value_lr", 5e-3, "--reward", f"model:{place}/rm"),
    )
    for ranks in (0, 2):
        run("train_ppo.py", *ppo(place, tmp_path / str(ranks), *flags), ranks=ranks)
    one, two = (metrics(tmp_path / str(ranks)) for ranks in (0, 2))
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"time/rollout", "time/step", "time/elapsed", "tokens_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-4), (a["step"], name)
    assert one[3]["objective/kl"] > 0.01
    names = dict(hf.load_model(tmp_path / "0").named_parameters())
    for name, p in hf.load_model(tmp_path / "2").named_parameters():
        assert (p - names[name]).abs().max() < LR / 10, name


@pytest.mark.slow
def test_the_value_model_learns_alone_first(place, tmp_path):
    run("train_ppo.py", *ppo(place, tmp_path, "--value_warmup", 1))
    before = dict(hf.load_model(place / "sft").named_parameters())
    for name, p in hf.load_model(tmp_path).named_parameters():
        assert torch.equal(p, before[name]), name
    for name, p in hf.load_scalar_model(tmp_path / "value").named_parameters():
        if "mlp" in name:
            assert (p - before[name]).abs().mean() > LR / 2, name


@pytest.mark.slow
def test_a_resumed_run_of_ppo_ends_with_the_same_weights(place, tmp_path):
    """Resumed where the value model alone has learnt, so that the policy has no moments yet."""
    flags = ("--steps", 4, "--save_every", 2, "--score_scale", "--beta", 0.1, "--value_warmup", 2)
    names = ("model.safetensors", "value/model.safetensors")
    run("train_ppo.py", *ppo(place, tmp_path, *flags))
    whole, lines = [(tmp_path / name).read_bytes() for name in names], metrics(tmp_path)
    for name in names:
        (tmp_path / name).unlink()
    done = run("train_ppo.py", *ppo(place, tmp_path, *flags, "--resume"))
    assert "resumed at step 2" in done.stdout
    assert [(tmp_path / name).read_bytes() for name in names] == whole
    again = metrics(tmp_path)
    for name in ("step", "objective/kl", "objective/scores", "loss/value_avg", "grad_norm"):
        assert [m.get(name) for m in again] == [m.get(name) for m in lines]
    assert abs(again[4]["objective/kl"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ("--prompts", 5),
            "--prompts 5 does not divide into 1 ranks x 2 minibatches: 4 or 6 would",
        ),
        (("--temperature", 0), "--temperature: 0: give more than 0"),
        (("--value_model", "nowhere"), "nowhere is not a folder"),
        (("--lr", 0, "--value_lr", 1e-3), "--value_lr needs --lr above 0"),
    ],
)
def test_what_cannot_be_trained_says_so(place, tmp_path, flags, sentence):
    done = run("train_ppo.py", *ppo(place, tmp_path, *flags), ok=False)
    assert sentence in done.stderr and "Traceback" not in done.stderr
