"""PPO: GAE, whitening and value loss against brute force. Its loop has a twin: twins/ppo.py."""

import itertools
import math

import numpy as np
import pytest
import torch
from scripts import run
from small import random_ids, small_config

from nanopost import advantages, dist, losses, optim
from nanopost.batch import Example, add_column, batch_of, padded
from nanopost.model import ActorCritic
from runs import toy

PROMPTS, EPOCHS, MINIBATCHES, SEED, TEMPERATURE, NEW, LR = 8, 2, 2, 4, 1.2, 6, 2e-3
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


# --------------------------------------------------------------------------------------- the script
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a short SFT run of the toy (sft), prompts, and a reward file."""
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "reward.py").write_text(REWARD)
    toy.write_model(folder / "model")
    toy.write_rows(folder / "rows.jsonl", toy.sft_rows()[:1000])
    quiet = ("--save_every", 0, "--eval_every", 0)
    flags = ("--steps", 12, "--rows", 16, "--lr", 3e-3, *quiet)
    data = ("--model", folder / "model", "--data", folder / "rows.jsonl")
    run("train_sft.py", *data, "--out", folder / "sft", *flags)
    prompts = []
    for a in range(2, 12):
        prompts.append({"prompt": [{"role": "user", "content": f"{a}+{3 * a}=?"}]})
    toy.write_rows(folder / "prompts.jsonl", prompts)
    return folder


def ppo(place, out, *more):
    """The command line of a rollout batch."""
    data = ("--data", place / "prompts.jsonl", "--eval_data", place / "prompts.jsonl")
    sampling = ("--prompts", PROMPTS, "--max_new_tokens", NEW, "--temperature", TEMPERATURE)
    updates = ("--ppo_epochs", EPOCHS, "--minibatches", MINIBATCHES, "--lr", LR, "--warmup", 0)
    length = ("--steps", 1, "--save_every", 0, "--tokens", 60, "--seed", SEED)
    reward = ("--reward", f"{place}/reward.py:digits")
    return (
        *("--model", place / "sft", "--out", out, *data),
        *(*sampling, *updates, *length, *reward, *more),
    )


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
