"""python -m nanopost.eval: what a checkpoint can do, each number with its 95 % interval.

    --model DIR --data FILE --reward gsm8k                       greedy accuracy
    --model DIR --data FILE --reward gsm8k --samples 16 --k 1 4 16      accuracy, pass@k and majority vote, sampled
    --model DIR --against DIR --reward_model DIR --data FILE     win rate: whose answer the reward model scores higher
    --model DIR --data FILE --perplexity                         of what train_sft.py would train on
    --reward_model DIR --data FILE                               scores; of pairs how often the chosen one wins

A row is one draw, however many samples are taken for it. Where a number is a share of yes and no the interval is
Wilson's (a bit too wide where a row is a share itself: nothing in [0, 1] varies as much as yes and no), else Student's.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from nanopost import InputError, dist, forward, hf, packing, toy
from nanopost.cli import Help, check_numbers, refuse
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.forward import logprobs
from nanopost.rewards import ModelReward, load_rewards, score_groups
from nanopost.rows import check_sft_row, read_rows
from nanopost.tokenizer import Tokenizer, check_stage
from nanopost.verify import answer_of

Z = 1.959964  # of the normal distribution, 95 % lie within


# ------------------------------------------------------------------------------------------------------------ numbers
def wilson(mean: float, n: int) -> tuple[float, float]:
    """The score interval of a mean of n values in [0, 1] (Wilson 1927), as if each were 0 or 1."""
    centre, spread = mean + Z**2 / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return (centre - spread) / (1 + Z**2 / n), (centre + spread) / (1 + Z**2 / n)


def student(n: int) -> float:
    """Within so many standard errors 95 % of the means of n values lie: Student's t, by its expansion in 1 / (n - 1)
    (Abramowitz and Stegun 26.7.5; 3 % short at n = 3, less beyond). Infinite for one value, which tells no spread."""
    if n < 2:
        return math.inf
    terms = (
        Z,
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return sum(term / (n - 1) ** power for power, term in enumerate(terms))


def normal(values) -> tuple[float, float, float]:
    """(mean, low, high) of values of any size."""
    half = (
        student(len(values)) * np.std(values, ddof=1) / math.sqrt(len(values))
        if len(values) > 1
        else math.inf
    )
    return float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k of the n samples is right, `right` of them being so: 1 - C(n - right, k) / C(n, k), as in
    2107.03374."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: list, rewards: list[float]) -> float:
    """Reward of the answer that most samples give; of several such the mean. None has no vote; nobody's vote is 0."""
    votes = Counter(a for a in answers if a is not None)
    reward_of = {a: r for a, r in zip(answers, rewards)}
    best = [a for a, n in votes.items() if n == max(votes.values())]
    return sum(reward_of[a] for a in best) / len(best) if best else 0.0


def perplexity(nll: list[float], tokens: list[int]) -> tuple[float, float, float]:
    """exp of the mean loss of a token, with the interval of that ratio over sequences (delta method)."""
    nll, tokens = np.asarray(nll), np.asarray(tokens)
    mean, n = nll.sum() / tokens.sum(), len(nll)
    error = math.sqrt(((nll - mean * tokens) ** 2).sum() * n / max(1, n - 1)) / tokens.sum()
    half = student(n) * error if n > 1 else math.inf
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


# ---------------------------------------------------------------------------------------------------------- what to do
class Sampler:
    """A checkpoint that answers prompts."""

    def __init__(self, folder, args, device):
        self.tokenizer, self.args, self.device = (
            Tokenizer.load(folder, args.chat_template),
            args,
            device,
        )
        if warning := check_stage(folder, self.tokenizer):
            print(warning)
        self.model = hf.load_model(folder, device, torch.bfloat16 if args.bf16 else torch.float32)
        self.engine = Engine(
            self.model, self.tokenizer.stop_ids, self.tokenizer.decode, args.engine_rows
        )

    def answers(self, rows):
        """-> (rows with prompt_ids, their groups of Rollouts)."""
        a = self.args
        (rows,), report = self.tokenizer.with_prompts(
            (rows,), None, a.max_new_tokens, a.tokens, self.model.config.max_positions
        )
        sampling = Sampling(
            a.max_new_tokens, a.temperature, a.top_k, a.top_p, a.min_p, tuple(a.stop)
        )
        seeds = [prompt_seed(a.seed, serial) for serial in range(len(rows))]
        return rows, self.engine.generate(
            [row["prompt_ids"] for row in rows], a.samples, sampling, seeds
        )


def accuracy(args, rows, device):
    sampler = Sampler(args.model, args, device)
    rewards, weights = load_rewards(args.reward, None, sampler.tokenizer, device)
    rows, groups = sampler.answers(rows)
    decode = sampler.tokenizer.decode
    reward_FPG = score_groups(rewards, decode, rows, groups, args.samples)
    texts = [[decode(r.ids, skip_special=True) for r in group] for group in groups]
    for reward, reward_PG in zip(rewards, reward_FPG.tolist()):
        applies = [p for p, reward_G in enumerate(reward_PG) if not any(map(math.isnan, reward_G))]
        if not applies:
            raise InputError(f"--reward {reward.name} applies to no row.")
        values = [reward_PG[p] for p in applies]
        kind = reward.name.partition("-")[0]  # gsm8k-2 is the second of that name
        if kind in ("length", "model") or any(
            v not in (0, 1) for reward_G in values for v in reward_G
        ):
            yield f"mean {reward.name}", *normal([np.mean(v) for v in values]), len(values)
            continue
        yield from bounded(f"accuracy {reward.name}", [np.mean(v) for v in values])
        if args.samples == 1:
            continue
        for k in args.k:
            passed = [pass_at_k(len(v), int(sum(v)), k) for v in values]
            yield from bounded(f"pass@{k} {reward.name}", passed)
        votes = [[answer_of(kind, text) for text in texts[p]] for p in applies]
        yield from bounded(
            f"majority of {args.samples} {reward.name}",
            [majority(a, v) for a, v in zip(votes, values)],
        )
    yield (
        "completion length",
        *normal([np.mean([len(r.ids) for r in group]) for group in groups]),
        len(groups),
    )
    keep(
        args,
        [
            {"prompt": row["prompt"], "completions": group, "rewards": reward_FPG[:, p].tolist()}
            for p, (row, group) in enumerate(zip(rows, texts))
        ],
    )


def win_rate(args, rows, device):
    """Ties count half."""
    scores, texts = [], []
    for folder in (args.model, args.against):
        sampler = Sampler(folder, args, device)
        rewards, _ = load_rewards([f"model:{args.reward_model}"], None, sampler.tokenizer, device)
        answered, groups = sampler.answers(rows)
        scores.append(
            score_groups(rewards, sampler.tokenizer.decode, answered, groups, args.samples)[0]
        )
        texts.append(
            [
                [sampler.tokenizer.decode(r.ids, skip_special=True) for r in group]
                for group in groups
            ]
        )
    wins_PG = (scores[0] > scores[1]).double() + (scores[0] == scores[1]).double() / 2
    yield from bounded("win rate", wins_PG.mean(1).tolist())
    yield "score difference", *normal((scores[0] - scores[1]).mean(1).tolist()), len(rows)
    keep(
        args,
        [
            {"prompt": row["prompt"], "completions": a, "against": b, "wins": w}
            for row, a, b, w in zip(rows, *texts, wins_PG.tolist())
        ],
    )


def of_text(args, rows, device):
    """Perplexity of the tokens that train_sft.py would train."""
    tokenizer = Tokenizer.load(args.model, args.chat_template)
    model = hf.load_model(args.model, device, torch.bfloat16 if args.bf16 else torch.float32)
    for row in rows:
        check_sft_row(row)
    longest = min(args.tokens, model.config.max_positions)
    examples, cut = packing.overlong([tokenizer.example(row) for row in rows], longest, "truncate")
    print(f"cut or left out: {packing.counted(cut)}")
    logps = logprobs(model, examples, args.tokens, 1.0, device)
    tokens = [e.num_targets for e in examples]
    yield "perplexity", *perplexity([-float(logp.sum()) for logp in logps], tokens), len(examples)
    keep(args, [{"nll": -float(logp.sum()), "tokens": n} for logp, n in zip(logps, tokens)])


def scored(args, rows, device):
    """A reward model on pairs, or on rows with one answer each."""
    tokenizer = Tokenizer.load(args.reward_model, args.chat_template)
    reward = ModelReward(args.reward_model, tokenizer, device, args.tokens)
    if "chosen" not in rows[0]:
        for row in rows:
            check_sft_row(row)
        score_B = forward.scores(
            reward.model, [tokenizer.example(row).ended() for row in rows], args.tokens, device
        )
        yield "score", *normal(score_B), len(rows)
        return keep(args, [{"score": s} for s in score_B])
    pairs = [tokenizer.pair(row) for row in rows]
    score_P2 = np.reshape(
        forward.scores(reward.model, [e for pair in pairs for e in pair], args.tokens, device),
        (-1, 2),
    )
    margin_P = score_P2[:, 0] - score_P2[:, 1]
    yield from bounded("accuracy", ((margin_P > 0) + (margin_P == 0) / 2).tolist())
    yield "margin", *normal(margin_P), len(rows)
    yield "score", *normal(score_P2.mean(1)), len(rows)
    keep(args, [{"chosen": a, "rejected": b} for a, b in score_P2.tolist()])


def bounded(name, values):
    yield name, float(np.mean(values)), *wilson(float(np.mean(values)), len(values)), len(values)


def keep(args, records):
    if args.out:
        Path(args.out).write_text("".join(json.dumps(record) + "\n" for record in records))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", help="folder of the checkpoint that answers")
    add("--against", metavar="DIR", help="another, to be compared with")
    add("--reward_model", metavar="DIR", help="what train_rm.py wrote")
    add("--data", required=True, help="rows, as the training script reads them, or toy")
    add(
        "--rename",
        nargs="*",
        default=[],
        metavar="THEIRS=OURS",
        help="columns, such as question=prompt",
    )
    add("--limit", type=int, help="only the first rows")
    add("--chat_template", help="a Jinja file used instead of the model's own template")
    add("--reward", nargs="+", help="as in train_grpo.py")
    add("--perplexity", action="store_true")
    add("--samples", type=int, default=1, help="of each prompt")
    add("--k", type=int, nargs="+", help="of pass@k; default: 1 and --samples")
    add("--temperature", type=float, help="default: 0 (greedy) for one sample, 1 for several")
    add("--top_k", type=int, default=0)
    add("--top_p", type=float, default=1.0)
    add("--min_p", type=float, default=0.0)
    add("--stop", nargs="*", default=[], help="strings that end a completion")
    add("--max_new_tokens", type=int, help="longest completion; default 512, for the toy 8")
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add(
        "--dtype",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="auto: bf16 on CUDA, else fp32",
    )
    add("--tokens", type=int, default=8192, help="tokens of a batch, at most")
    add("--engine_rows", type=int, default=512, help="completions sampled at once")
    add("--out", help="JSONL with what each row gave")
    args = parser.parse_args(arguments)
    world = dist.init(args.device)
    check_numbers(vars(args))
    args.bf16 = args.dtype == "bf16" or (args.dtype == "auto" and world.device.type == "cuda")
    args.temperature = (
        (0.0 if args.samples == 1 else 1.0) if args.temperature is None else args.temperature
    )
    args.max_new_tokens = (
        args.max_new_tokens if args.max_new_tokens is not None else 8 if args.data == "toy" else 512
    )
    args.reward = args.reward or ["exact"] * (args.data == "toy")
    args.k = args.k or sorted({1, args.samples})
    refuse(
        (
            not args.model and not args.reward_model,
            "give --model, or --reward_model, or both: see --help.",
        ),
        (
            bool(args.against) != bool(args.model and args.reward_model),
            "a win rate needs all of --model, --against and --reward_model.",
        ),
        (max(args.k) > args.samples, f"pass@{max(args.k)} needs --samples {max(args.k)}."),
        (
            args.samples > 1 and not args.temperature,
            "--samples above 1 would all be alike at --temperature 0.",
        ),
        (
            not (folder := Path(args.out or ".").absolute().parent).is_dir(),
            f"--out {args.out}: there is no folder {folder}: make it first.",
        ),
    )
    rows = (
        toy.prompt_rows(held_out=True) if args.data == "toy" else read_rows(args.data, args.rename)
    )
    rows = rows[: args.limit]
    what = (
        scored
        if not args.model
        else win_rate
        if args.against
        else of_text
        if args.perplexity
        else accuracy
    )
    for name, value, low, high, n in what(args, rows, world.device):
        print(f"{name:32s} {value:8.4f}   95 % interval {low:8.4f} to {high:8.4f}   {n:,} rows")
    dist.finish()


if __name__ == "__main__":
    main()
