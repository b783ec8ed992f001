"""--reproducible: the same bytes on any number of ranks, and what it takes."""

import json
import math
import os
import signal
import subprocess
import time
from fractions import Fraction

import kills
import numpy as np
import pytest
import torch
from inprocess import run_here
from ranks import on_ranks
from scripts import ENVIRONMENT, SCRIPTS, command, metrics, weights
from small import random_ids, small_config, small_model
from twins import common, double

from nanopost import InputError, StepError, dist, optim, rewards
from nanopost.batch import Example
from nanopost.engine import Engine, Sampling
from nanopost.forward import batches
from nanopost.model import CausalLM
from nanopost.reproducible import FixedPoint, OrderFree, exact, rounded, row_sums, sum_of_squares
from nanopost.rollout import Rollout
from runs import toy

CPU = torch.device("cpu")


@pytest.fixture
def reproducible(monkeypatch):
    monkeypatch.setattr(dist, "reproducible", True)


# -------------------------------------------------------------------------------------- exact sums
@pytest.mark.parametrize("spread", [0, 5, 100])
def test_an_exact_sum_is_that_of_fractions_in_any_order(spread):
    draw = torch.Generator().manual_seed(spread)
    x = torch.randn(2000, generator=draw, dtype=torch.float64)
    x *= torch.exp(spread * torch.randn(2000, generator=draw, dtype=torch.float64))
    x = torch.cat([x, -x[:500], torch.tensor([0.0, -0.0, 1e-320, 5e-324], dtype=torch.float64)])
    expected = sum(map(Fraction, x.tolist()))
    assert exact(x) == expected
    order = torch.randperm(len(x), generator=draw)
    assert exact(x[order[:70]]) + exact(x[order[70:]].view(2, -1)) == expected
    assert rounded(expected) == math.fsum(x.tolist())


def test_an_exact_sum_of_numbers_of_any_kind():
    for x in (3, 0.1, np.float32(0.1), np.int64(7), True, torch.tensor(0.1), Fraction(1, 3)):
        assert exact(x) == Fraction(x.item() if hasattr(x, "item") else x)
    assert exact(torch.tensor([True, True, False])) == 2 and exact(torch.zeros(0)) == 0
    assert exact(torch.tensor([2**24 + 1, 2**24 + 1])) == 2**25 + 2


def test_what_is_not_finite_stays_so():
    inf, nan = math.inf, math.nan
    assert exact(torch.tensor([1.0, inf])) == exact(inf) == inf
    assert math.isnan(exact(torch.tensor([inf, -inf]))) and math.isnan(exact(nan))
    assert math.isnan(rounded(exact(torch.tensor([1.0, nan])) + exact(1.0)))
    assert rounded(Fraction(10) ** 400) == inf and rounded(-(Fraction(10) ** 400)) == -inf


def test_the_sum_of_a_row_does_not_see_its_padding():
    row = torch.randn(37, dtype=torch.float64)
    padded = torch.cat([row, torch.zeros(90)])
    assert row_sums(row[None]).tolist() == row_sums(padded[None]).tolist() == [math.fsum(row)]
    assert row_sums(torch.zeros(0, 0)).tolist() == []


def test_a_norm_in_integers_is_that_of_float64():
    for scale in (1e-20, 1.0, 1e15):
        x = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * scale
        x[:100] *= 1e-6
        exponent = math.frexp(float(x.abs().max()))[1]
        square = sum_of_squares(x[:1234], exponent) + sum_of_squares(x[1234:], exponent)
        norm = math.sqrt(Fraction(square) * Fraction(2) ** (2 * exponent - 72))
        assert norm == pytest.approx(float(x.double().norm()), rel=1e-12)


# --------------------------------------------------------------------------------------- gradients
def test_the_fixed_points_error_against_float64():
    """Each term is off by half a step of 2^-44 at most: 2.9e-14."""
    for size in (1.0, 1e-3, 1e-6, 1e-8, 1e-10):
        terms = [
            size * torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(16)
        ]
        total, found = FixedPoint(), None
        for term in terms:
            found = term.clone()
            total.add(found)
        expected = sum(term.double() for term in terms)
        error = (found.double() - expected).abs().max()
        fp32 = (expected.float().double() - expected).abs().max()
        assert error <= fp32 + 16 * 2.0**-45
        print(f"gradients of {size:g}: error {error:.1e}, {error / (4 * size):.1e} of them")


def step_of(model, tokens=40, seed=0):
    """A training step of uneven examples -> the norm of its gradient, which is in the model."""
    draw = np.random.default_rng(seed)
    lengths = (3, 40, 7, 2, 25, 11, 30)
    examples = [Example(draw.integers(0, 61, n), draw.random(n) < 0.6) for n in lengths]
    mine = examples[dist.dist.get_rank() :: dist.dist.get_world_size()]
    for batch in batches(model, mine, tokens, "cpu"):
        logp_N, _ = model(batch)
        (-logp_N.sum() / 70).backward()
    return dist.clip_grad_norm(model, 0.5)


def test_the_gradient_in_fixed_point_is_that_of_float64(alone, reproducible):
    """Over several micro-batches, and again in a second step."""
    model, other = small_model(), small_model().double()
    model.order_free = OrderFree(model, [])
    for seed in (0, 1):
        norm, expected = step_of(model, seed=seed), step_of(other, seed=seed)
        assert norm == pytest.approx(expected, rel=1e-6)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-7, rtol=1e-5)
            p.grad = q.grad = None


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_a_model_has_the_same_weights_on_any_number_of_ranks(tmp_path, reproducible, clip):
    def task(rank, size):
        world = dist.World(rank, size, CPU, torch.float32)
        model = dist.shard(CausalLM(small_config()).init_weights(0), world)
        optimizer = optim.adamw(model, 0.1)
        optim.set_learning_rate(optimizer, 0.01)
        norms = []
        for seed in range(3):
            norms.append(step_of(model, seed=seed))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms, [w.numpy().tobytes() for _, w in dist.full_weights(model)]

    one, two, three = (on_ranks(size, tmp_path, task) for size in (1, 2, 3))
    assert two == one * 2 and three == one * 3


def test_adamw_does_not_see_where_a_shard_begins(reproducible):
    """A fused one does in about one of twenty of these."""
    for size in (7, 15, 33, 1001):
        draw = torch.Generator().manual_seed(size)
        for _ in range(6):
            w, *gradients = torch.randn(5, size, generator=draw)
            found = []
            for cut in (0, 1, size // 3, size // 2, size - 1):
                parts = torch.nn.ParameterList([w[:cut].clone(), w[cut:].clone()])
                optimizer = optim.adamw(parts, 0.1)
                optim.set_learning_rate(optimizer, 0.01)
                for g in gradients:
                    parts[0].grad, parts[1].grad = 0.01 * g[:cut], 0.01 * g[cut:]
                    optimizer.step()
                found.append(torch.cat([p.detach() for p in parts]))
            assert all(torch.equal(x, found[0]) for x in found)


def test_a_gradient_beyond_the_fixed_point_is_one_sentence(alone, reproducible):
    model = torch.nn.Linear(2, 1, bias=False)
    model.order_free = OrderFree(model, [])

    def norm(largest):
        model.order_free.before_pass()
        model.weight.grad = torch.tensor([[1.0, largest]])
        model.order_free.after_pass()
        return dist.clip_grad_norm(model, 0)

    assert norm(2.0**17) == pytest.approx(2.0**17)
    with pytest.raises(StepError, match="as large as 3e.05, and --reproducible .* below 262,144"):
        norm(3e5)
    assert math.isnan(norm(math.nan)) and norm(-math.inf) == math.inf
    assert norm(0.0) == 1.0  # nothing is left of these


def test_a_gradient_that_is_not_a_number_is_seen_wherever_it_is(alone, reproducible):
    """In the value model of an ActorCritic, say, whose policy comes first."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    model.order_free = OrderFree(model, [])
    for i in range(3):
        model.order_free.before_pass()
        for k, layer in enumerate(model):
            layer.weight.grad = torch.full((2, 2), math.nan if i == k else 1e-6)
        model.order_free.after_pass()
        assert math.isnan(dist.clip_grad_norm(model, 1.0))


# ------------------------------------------------------------------------------ samples and rewards
def test_the_engine_samples_by_chunks(reproducible):
    """Of the prompts of several ranks together it samples what each rank samples, to the bit."""
    prompts = [random_ids(3 + 5 * i % 17, seed=i) for i in range(20)]
    seeds, sampling = list(range(0, 200, 10)), Sampling(12)
    engine = Engine(small_model(), stop_ids=range(6))

    def sampled(part):
        groups = engine.generate([prompts[i] for i in part], 3, sampling, [seeds[i] for i in part])
        return [(r.ids, r.logp.tobytes()) for group in groups for r in group]

    chunks = [range(8), range(8, 16), range(16, 20)]
    assert sampled(range(20)) == [x for chunk in chunks for x in sampled(chunk)]


def test_rewards_are_called_by_chunks(reproducible):
    calls = []

    def called(completions, **columns):
        calls.append(len(completions))
        return [float(len(calls))] * len(completions)

    class Tokenizer:
        stop_ids = ()
        decode = staticmethod(str)

    rows_P = [{"prompt": "p"}] * 19
    groups = [[Rollout([1], [2], np.zeros(1), "stop", 0)] * 2] * 19
    reward_FPG = rewards.score([rewards.Reward("x", called)], Tokenizer, rows_P, groups)
    assert calls == [16, 16, 6]
    assert reward_FPG[0, :, 1].tolist() == [1.0] * 8 + [2.0] * 8 + [3.0] * 3


# ----------------------------------------------------------------------------------------- scripts
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """common.write_place with more rows: several chunks of prompts, and uneven micro-batches."""
    folder = common.write_place(tmp_path_factory.mktemp("place"))
    kinds = {"sft": common.sft_rows, "pairs": common.pair_rows}
    kinds |= {"labelled": common.labelled_rows, "prompts": common.prompt_rows}
    for name, rows in kinds.items():
        toy.write_rows(folder / f"{name}.jsonl", rows(30))
        toy.write_rows(folder / f"{name}_held_out.jsonl", rows(11, first=40))
    return folder


SHARED = (
    "--steps 3 --warmup 0 --lr 3e-3 --weight_decay 0.1 --eval_every 2 --save_every 1 --keep 9 "
    "--device cpu --reproducible"
)
SAMPLES = (
    "--prompts 24 --group 2 --max_new_tokens 5 --minibatches 2 --reward {place}/reward.py:letters "
    "model:{place}/rm --reward_weights 1 0.3 --tokens 200"
)
OWN = {
    "train_sft.py": "--rows 11 --tokens 110",
    "train_rm.py": "--rows 7 --tokens 110 --centre 0.01",
    "train_dpo.py": "--rows 7 --tokens 110 --loss sigmoid sft",
    "train_kto.py": "--rows 7 --tokens 110",
    "train_online_dpo.py": SAMPLES.replace("--minibatches 2", "--reference_model {place}/other"),
    "train_grpo.py": SAMPLES + " --resample 1 --beta 0.05 --old_logp trainer --adv batch",
    "train_ppo.py": SAMPLES + " --beta 0.05 --score_scale --whiten_rewards",
    "train_distill.py": "--teacher {place}/other --beta 0.4 --prompts 24 --max_new_tokens 5 "
    "--minibatches 2 --reward model:{place}/rm --tokens 200",
}
DATA = {"train_sft.py": "sft", "train_rm.py": "pairs", "train_dpo.py": "pairs"}
DATA |= {"train_kto.py": "labelled"}


def flags(place, script, out):
    data = place / DATA.get(script, "prompts")
    given = f"--model {place}/model --data {data}.jsonl --eval_data {data}_held_out.jsonl "
    given += f"--out {out} {SHARED} {OWN[script]}"
    return given.format(place=place).split()


def plainly(script, arguments, stop):
    run_here(os.path.basename(script), *arguments)


def remains(out):
    """The bytes of what a run leaves, but for what a clock measures."""
    lines = metrics(out)
    for line in lines:
        for name in [n for n in line if n.startswith("time/") or n == "tokens_per_second"]:
            del line[name]
    values = out / "value" / "model.safetensors"
    return json.dumps(lines), weights(out), values.read_bytes() if values.exists() else b""


CASES = [(script, 0) for script in SCRIPTS]
CASES += [(script, 3) for script in ("train_sft.py", "train_grpo.py", "train_ppo.py")]
SHORT = ("train_sft.py", 3), ("train_dpo.py", 0), ("train_grpo.py", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, rank",
    [pytest.param(*case, marks=() if case in SHORT else pytest.mark.long) for case in CASES],
)
def test_a_run_has_the_same_bytes_on_any_number_of_ranks(place, tmp_path, script, rank):
    """rank: of adapters; 0: all weights train."""
    found = []
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        given = [*flags(place, script, out), "--lora", str(rank)]
        double.run_ranks(ranks, script, given, tmp_path / "log", run=plainly)
        found.append(remains(out))
    assert len(metrics(out)) == 4 and metrics(out)[-1]["grad_norm"] > 0
    assert found[0] == found[1] == found[2]


@pytest.mark.long
def test_a_run_killed_on_four_ranks_and_resumed_on_one_is_one_on_two(place, tmp_path):
    script = "train_grpo.py"
    out, log = tmp_path / "killed", tmp_path / "log"
    more = ("--steps", "10", "--save_every", "2")
    process = subprocess.Popen(
        command(script, *flags(place, script, out), *more, ranks=4),
        env=ENVIRONMENT,
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
    )
    while not (out / "checkpoints/step-000002/state.json").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    for pid in (process.pid, *kills.workers(out)):
        os.kill(pid, signal.SIGKILL)
    kills.wait_until_gone(process, out, "killed")
    assert len(metrics(out)) < 9
    double.run_ranks(1, script, [*flags(place, script, out), *more, "--resume"], log, run=plainly)
    other = tmp_path / "other"
    double.run_ranks(2, script, [*flags(place, script, other), *more], log, run=plainly)
    assert remains(out) == remains(other)


@pytest.mark.parametrize("more", [("--max_staleness", 1), ("--vllm", "http://localhost:1")])
def test_what_cannot_be_reproduced_is_refused(place, tmp_path, more):
    given = flags(place, "train_grpo.py", tmp_path / "x")
    with pytest.raises(InputError, match="--reproducible samples with nanopost's own engine"):
        run_here("train_grpo.py", *given, *more)
    with pytest.raises(InputError, match="leave out --reduce step"):
        run_here("train_grpo.py", *given, "--reduce", "step")
