"""python -m nanopost.eval: what a checkpoint can do, each number with its 95% interval.

    --model DIR --data FILE --reward gsm8k                  accuracy of greedy answers
    --model DIR --data FILE --reward gsm8k --samples 16 --k 1 4 16
                                                            accuracy, pass@k and majority vote
    --model DIR --data FILE --against DIR --reward_model DIR
                                                            win rate: whose answer scores higher
    --model DIR --data FILE --perplexity                    of the tokens train_sft.py would train
    --model DIR --data FILE --kl DIR                        KL(model || DIR) per completion, nats
    --reward_model DIR --data FILE                          scores; for pairs, how often chosen wins

Each row is one observation, however many samples it gets. Proportions get Wilson's interval (a
little too wide if each row is itself a proportion: nothing in [0, 1] varies as much as yes and no),
everything else Student's.
"""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from nanopost import InputError, cli, dist, forward, hf, packing, rewards
from nanopost.cli import Parser, at_least
from nanopost.engine import Sampling, prompt_seed
from nanopost.manifest import named_files
from nanopost.rollout import completion_text
from nanopost.rows import pair, prompt, read_rows, sft
from nanopost.terminal import progress, say
from nanopost.tokenizer import Tokenizer, check_stage
from nanopost.verify import answer_of

# Flags of files that are read
READ = ("data", "model", "chat_template", "reward", "against", "reward_model", "kl")
Z = 1.959964  # 95% of the normal distribution lies within


# ------------------------------------------------------------------------------------------ numbers
def wilson(mean: float, n: int) -> tuple[float, float]:
    """Score interval of a mean of n values in [0, 1] (Wilson 1927), as if each were 0 or 1."""
    centre = mean + Z**2 / (2 * n)
    spread = Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return (centre - spread) / (1 + Z**2 / n), (centre + spread) / (1 + Z**2 / n)


def student(n: int) -> float:
    """The number of standard errors within which 95% of the means of n values lie.

    Student's t by its expansion in 1 / (n - 1) (Abramowitz and Stegun 26.7.5; 3% too small at
    n = 3, less beyond). Infinite for one value, which has no spread.
    """
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
    mean, half = float(np.mean(values)), math.inf
    if len(values) > 1:
        half = student(len(values)) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, float(mean - half), float(mean + half)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that any of k samples drawn from n is right, if `right` of the n are (2107.03374):
    1 - C(n - right, k) / C(n, k)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: list, rewards: list[float]) -> float:
    """Reward of the most frequent answer, a mean if tied; 0 without votes. None is not a vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    reward_of = dict(zip(answers, rewards))
    best = [reward_of[answer] for answer, count in votes.items() if count == most]
    return sum(best) / len(best)


def perplexity(nll: list[float], tokens: list[int]) -> tuple[float, float, float]:
    """exp of the mean loss per token, with its interval over sequences (delta method).

    nll, tokens: loss of each sequence in nats, and its number of trained tokens.
    """
    nll, tokens = np.asarray(nll), np.asarray(tokens)
    mean, n = nll.sum() / tokens.sum(), len(nll)
    half = math.inf
    if n > 1:
        residual = ((nll - mean * tokens) ** 2).sum()
        half = student(n) * (math.sqrt(residual * n / (n - 1)) / tokens.sum())
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


# ------------------------------------------------------------------------------------------ answers
class Sampler:
    """A checkpoint that answers prompts."""

    def __init__(self, folder, args, world):
        self.args = args
        self.tokenizer = Tokenizer.load(folder, args.chat_template)
        if warning := check_stage(folder, self.tokenizer):
            say(warning)
        self.model = hf.load_model(folder, world.device, world.dtype)
        self.engine = cli.engine(args, folder, self.model, world, self.tokenizer)

    def answers(self, rows):
        """-> (the rows with prompt_ids, --samples Rollouts of each)."""
        args, positions = self.args, self.model.config.max_positions
        (rows,), _ = self.tokenizer.with_prompts(
            ([prompt(row) for row in rows],), None, args.max_new_tokens, args.tokens, positions
        )
        say(self.tokenizer.doubts(rows))
        sampling = Sampling(
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            args.top_p,
            args.min_p,
            tuple(args.stop),
        )
        prompts = [row["prompt_ids"] for row in rows]
        seeds = [prompt_seed(args.seed, serial) for serial in range(len(rows))]
        self.engine.sync_weights(self.model.state_dict().items(), 0)
        return rows, self.engine.generate(prompts, args.samples, sampling, seeds)

    def texts(self, groups):
        return [[completion_text(r, self.tokenizer) for r in group] for group in groups]


# --------------------------------------------------------------- evaluations: -> (numbers, records)
def accuracy(args, rows, world):
    sampler = Sampler(args.model, args, world)
    tokenizer = sampler.tokenizer
    functions, _ = cli.load_rewards(args, tokenizer, world)
    if warning := rewards.check(functions, rows):
        say(warning)
    rows, groups = sampler.answers(rows)
    texts_PG = sampler.texts(groups)
    reward_FPG = rewards.score(functions, tokenizer, rows, groups).numpy()
    numbers = []
    for reward, reward_PG in zip(functions, reward_FPG):
        applies = [p for p, reward_G in enumerate(reward_PG) if not np.isnan(reward_G).any()]
        if not applies:
            raise InputError(f"--reward {reward.name} applies to no row.")
        texts = [texts_PG[p] for p in applies]
        numbers += of_reward(args, reward.name, reward_PG[applies], texts)
    numbers.append(completion_length(groups))
    records = [
        {"prompt": row["prompt"], "completions": texts, "rewards": reward_FG.tolist()}
        for row, texts, reward_FG in zip(rows, texts_PG, reward_FPG.swapaxes(0, 1))
    ]
    return numbers, records


def of_reward(args, name, reward_PG, texts_PG):
    """The mean of a reward; for one that is 0 or 1, also pass@k and the majority vote."""
    kind = name.partition("-")[0]  # gsm8k-2 is the second gsm8k
    if kind in ("length", "model") or not np.isin(reward_PG, (0, 1)).all():
        return [(f"mean {name}", *normal(reward_PG.mean(1)), len(reward_PG))]
    numbers = [share(f"accuracy {name}", reward_PG.mean(1))]
    if args.samples == 1:
        return numbers
    for k in args.k:
        passed = [pass_at_k(args.samples, int(right), k) for right in reward_PG.sum(1)]
        numbers.append(share(f"pass@{k} {name}", passed))
    votes = []
    for texts, reward_G in zip(texts_PG, reward_PG.tolist()):
        votes.append(majority([answer_of(kind, text) for text in texts], reward_G))
    numbers.append(share(f"majority of {args.samples} {name}", votes))
    return numbers


def win_rate(args, rows, world):
    """The share of samples that score higher than the other model's; ties count half."""
    scores, texts = [], []
    for folder in (args.model, args.against):
        sampler = Sampler(folder, args, world)
        tokenizer = sampler.tokenizer
        spec = f"model:{args.reward_model}"
        functions, _ = rewards.load([spec], None, tokenizer, world, args.tokens)
        answered, groups = sampler.answers(rows)
        score_FPG = rewards.score(functions, tokenizer, answered, groups)
        scores.append(score_FPG[0])
        texts.append(sampler.texts(groups))
    ours_PG, theirs_PG = scores
    wins_PG = (ours_PG > theirs_PG).double() + (ours_PG == theirs_PG).double() / 2
    difference_P = (ours_PG - theirs_PG).mean(1).tolist()
    numbers = [
        share("win rate", wins_PG.mean(1).tolist()),
        ("score difference", *normal(difference_P), len(rows)),
    ]
    records = [
        {"prompt": row["prompt"], "completions": ours, "against": theirs, "wins": wins}
        for row, ours, theirs, wins in zip(rows, *texts, wins_PG.tolist())
    ]
    return numbers, records


def divergence(args, rows, world):
    """KL(model || other) over the first --max_new_tokens tokens of a completion, in nats.

    The mean over the model's samples y of log p(y) - log q(y): unbiased, though a single one can
    be negative.
    """
    sampler = Sampler(args.model, args, world)
    sampler.tokenizer.check_same(args.kl, "--kl ")
    rows, groups = sampler.answers(rows)
    other = hf.load_model(args.kl, world.device, world.dtype)
    rollouts = [r for group in groups for r in group]
    examples = [r.example() for r in rollouts]
    # Both by the same computation: in bf16 the engine's rounding would count as a divergence.
    logps = forward.logprobs(sampler.model, examples, args.tokens, 1.0, world.device)
    other_logps = forward.logprobs(other, examples, args.tokens, 1.0, world.device)
    log_ratios = [
        float(logp.sum(dtype=float) - other_logp.sum(dtype=float))
        for logp, other_logp in zip(logps, other_logps)
    ]
    kl_PG = np.reshape(log_ratios, (len(rows), args.samples))
    numbers = [("kl", *normal(kl_PG.mean(1)), len(rows)), completion_length(groups)]
    records = [
        {"prompt": row["prompt"], "completions": texts, "log_ratios": kl_G}
        for row, texts, kl_G in zip(rows, sampler.texts(groups), kl_PG.tolist())
    ]
    return numbers, records


def of_text(args, rows, world):
    """Perplexity of the tokens that train_sft.py would train on."""
    tokenizer = Tokenizer.load(args.model, args.chat_template)
    say(tokenizer.doubts(rows))
    model = hf.load_model(args.model, world.device, world.dtype)
    longest = min(args.tokens, model.config.max_positions)
    examples, cut = packing.fit_to(
        [tokenizer.example(sft(row)) for row in progress(rows, "rows encoded")], longest, "truncate"
    )
    say(f"truncated or dropped: {packing.counted(cut)}")
    logps = forward.logprobs(model, examples, args.tokens, 1.0, world.device)
    nll = [-float(logp.sum()) for logp in logps]
    tokens = [e.num_targets for e in examples]
    numbers = [("perplexity", *perplexity(nll, tokens), len(examples))]
    return numbers, [{"nll": a, "tokens": n} for a, n in zip(nll, tokens)]


def scored(args, rows, world):
    """A reward model on pairs, or on rows with one answer each."""
    tokenizer = Tokenizer.load(args.reward_model, args.chat_template)
    say(tokenizer.doubts(rows))
    model = hf.load_scalar_model(args.reward_model, world.device, world.dtype)
    if "chosen" not in rows[0]:
        examples = [tokenizer.example(sft(row)).ended() for row in progress(rows, "rows encoded")]
        score_B = forward.scores(model, examples, args.tokens, world.device)
        return [("score", *normal(score_B), len(rows))], [{"score": score} for score in score_B]
    examples = [e for row in progress(rows, "pairs encoded") for e in tokenizer.pair(pair(row))]
    score_P2 = np.reshape(forward.scores(model, examples, args.tokens, world.device), (-1, 2))
    margin_P = score_P2[:, 0] - score_P2[:, 1]
    numbers = [
        share("accuracy", ((margin_P > 0) + (margin_P == 0) / 2).tolist()),
        ("margin", *normal(margin_P), len(rows)),
        ("score", *normal(score_P2.mean(1)), len(rows)),
    ]
    records = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in score_P2.tolist()]
    return numbers, records


def share(name, values):
    mean = float(np.mean(values))
    return name, mean, *wilson(mean, len(values)), len(values)


def completion_length(groups):
    lengths = [np.mean([r.length for r in group]) for group in groups]
    return "completion length", *normal(lengths), len(groups)


# ------------------------------------------------------------------------------------- command line
def parsed(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="folder of the model that answers")
    add("--data", nargs="+", required=True, help="rows, as the training scripts read them")
    add("--reward", nargs="+", help="what scores the answers, as in train_grpo.py")
    add(
        "--reward_timeout",
        type=at_least(0.0),
        default=0.0,
        help="seconds per call of a reward; 0: no limit",
    )
    add("--unsafe_code", action="store_true", help="--reward code without a sandbox")
    parser.set_defaults(reward_weights=None)  # rewards are reported one by one
    add("--against", metavar="DIR", help="another model, to compute the win rate over it")
    add("--reward_model", metavar="DIR", help="folder written by train_rm.py")
    add("--perplexity", action="store_true", help="perplexity of the rows' own answers")
    add("--kl", metavar="DIR", help="another model: how far the first one has moved from it")
    add(
        "--rename",
        nargs="*",
        default=[],
        metavar="THEIRS=OURS",
        help="rename columns, such as question=prompt",
    )
    add(
        "--to_messages",
        action="store_true",
        help="put plain-text prompts and answers into the chat template, as messages",
    )
    add("--limit", type=at_least(1), help="use only the first rows")
    add("--chat_template", help="Jinja file that replaces the model's chat template")
    add("--samples", type=at_least(1), default=1, help="samples per prompt")
    add("--k", type=at_least(1), nargs="+", help="k of pass@k; default: 1 and --samples")
    add(
        "--temperature",
        type=at_least(0.0),
        help="default: 0 (greedy) for one sample, 1 for several and for --kl",
    )
    cli.add_cut_flags(parser)
    add("--stop", nargs="*", default=[], help="strings that end a completion")
    add("--max_new_tokens", type=at_least(1), default=512, help="maximum completion length")
    add("--seed", type=at_least(0), default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add(
        "--dtype",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="auto: bf16 on CUDA, else fp32",
    )
    add("--tokens", type=at_least(2), default=8192, help="maximum tokens per batch")
    cli.add_engine_flags(parser)
    add("--out", metavar="FILE", help="JSONL with the result of each row")
    args = parser.parse_args(arguments)
    if args.temperature is None:
        args.temperature = 0.0 if args.samples == 1 and not args.kl else 1.0
    args.k = args.k or sorted({1, args.samples})
    return args


def evaluation(args):
    """The function that the flags ask for. InputError if they conflict."""
    if not args.model and not args.reward_model:
        raise InputError("give --model, or --reward_model, or both: see --help.")
    if bool(args.against) != bool(args.model and args.reward_model):
        raise InputError("a win rate needs all of --model, --against and --reward_model.")
    if args.against and args.engine == "colocate":
        raise InputError("--engine colocate has room for one model: for --against use another.")
    if max(args.k) > args.samples:
        raise InputError(f"pass@{max(args.k)} needs --samples {max(args.k)}.")
    if args.samples > 1 and not args.temperature:
        raise InputError("--samples above 1 would all be equal at --temperature 0.")
    cut = args.top_k or args.top_p < 1 or args.min_p
    if args.kl and (cut or args.temperature != 1):
        raise InputError(
            "--kl needs samples from the whole distribution: drop --temperature, --top_k, "
            "--top_p and --min_p."
        )
    for read in named_files({name: getattr(args, name) for name in READ}):
        if args.out and Path(args.out).resolve().is_relative_to(Path(read).resolve()):
            raise InputError(
                f"--out {args.out} would replace what is read, {read}: choose another."
            )
    folder = Path(args.out or ".").absolute().parent
    if not folder.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {folder}: create it first.")
    if not args.model:
        return scored
    functions = {
        "reward": accuracy,
        "against": win_rate,
        "perplexity": of_text,
        "kl": divergence,
    }
    asked = [name for name in functions if getattr(args, name)]
    if len(asked) != 1:
        given = ", ".join(f"--{name}" for name in asked) or "none of them"
        raise InputError(
            f"{given} given: choose exactly one of --reward, --against, --perplexity and --kl."
        )
    return functions[asked[0]]


def main(arguments=None):
    args = parsed(arguments)
    world = dist.init(args.device, args.dtype)
    evaluate = evaluation(args)
    rows = read_rows(args.data, args.rename, to_messages=args.to_messages)[: args.limit]
    numbers, records = evaluate(args, rows, world)
    for name, value, low, high, n in numbers:
        say(f"{name:32s} {value:8.4f}   95% interval {low:8.4f} to {high:8.4f}   {n:,} rows")
    if args.out:
        Path(args.out).write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
    dist.finish()


if __name__ == "__main__":
    main()
