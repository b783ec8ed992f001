"""The twin of train_dpo.py, and what it shares with those of train_kto.py and train_online_dpo.py.

The formulas are those of the papers that nanopost/preference.py names, and of TRL where it differs
from them.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from nanopost import plain
from twins import common

SCRIPT = "train_dpo.py"
PLAIN = "--model {place}/model --data {place}/pairs.jsonl --eval_data {place}/pairs_held_out.jsonl "
NEAR = PLAIN + "--reference_model {place}/near "
SCORES = "--loss sigmoid sigmoid_norm ipo hinge robust exo discopop "
RUNS = {
    # Each term is weighted, so a wrong term makes a wrong sum.
    "forward_kl": NEAR + SCORES + "--loss_weights 1 0.6 0.05 1.3 0.7 0.9 0.4 --smoothing 0.15 "
    "--beta 0.3 --divergence forward_kl --steps 3 --rows 5 --seed 3 --lr 4e-3 --warmup 0 "
    "--weight_decay 0.4 --grad_clip 0.6 --eval_every 2 --max_length 30 --tokens 80 "
    "--chat_template {place}/chat.jinja --checkpointing full",
    "js": "--model {place}/model --reference_model {place}/near --data {place}/theirs.jsonl "
    "--rename better=chosen worse=rejected --holdout 6 " + SCORES + "--loss_weights 0.5 0.8 "
    "0.03 1.1 1.2 0.7 0.6 --smoothing 0.2 --divergence js --epochs 1.4 --rows 4 --max_length 20 "
    "--overlong drop --tokens 50 --lr 2e-3 --warmup 1 --kernels torch --grad_clip 0 "
    "--checkpointing selective "
    "--reference precomputed --cache {place}/cache",
    "alpha": NEAR + SCORES + "--loss_weights 0.9 0.4 0.02 1.2 0.8 1.4 0.5 --smoothing 0.1 "
    "--divergence alpha --alpha 0.3 --steps 3 --rows 5 --lr 3e-3 --warmup 0 --tokens 50 "
    "--reference precomputed --cache {place}/cache --to_messages --eval_rows 4",
    "ratios": PLAIN + "--reference_model {place}/other --loss nca sppo apo_zero apo_down "
    "--loss_weights 1 0.01 1.4 0.7 --beta 0.07 --steps 3 --rows 5 --lr 3e-3 --warmup 0",
    "without_reference": PLAIN + "--loss simpo cpo sft --loss_weights 0.8 0.5 0.3 --beta 0.7 "
    "--gamma 0.9 --smoothing 0.1 --steps 3 --rows 5 --lr 3e-3 --warmup 0",
    "orpo": PLAIN + "--loss orpo simpo --beta 0.6 --steps 3 --rows 5 --lr 3e-3 --warmup 0",
    "lora": NEAR + "--steps 3 --rows 5 --lr 2e-2 --warmup 0 --seed 1 --lora 3 --lora_alpha 5 "
    "--rslora --lora_targets q_proj down_proj",
    "fork ld_dpo": NEAR + "--loss sigmoid sft --ld_alpha 0.4 --steps 3 --rows 5 --lr 3e-3",
    "fork tr_dpo": NEAR + "--follow_every 2 --steps 5 --rows 4 --lr 3e-3 --eval_every 1",
    "fork wpo": NEAR + "--loss sigmoid_norm --steps 3 --rows 5 --lr 3e-3",
}
PAIR_METRICS = (
    "loss",
    *("rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "rewards/ties"),
    *("logps/chosen", "logps/rejected"),
)
METRICS = {
    *PAIR_METRICS,
    *(f"eval/{name}" for name in PAIR_METRICS),
    *("entropy", "grad_norm", "lr", "epoch", "num_tokens"),
}


def write_near(place):
    """near/: the model of the place, moved a little, so that log-ratios are neither 0 nor large."""
    model = common.language_model(place / "model")
    draw = torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    model.save_pretrained(place / "near")
    common.tokenizer(place / "model").save_pretrained(place / "near")


# --------------------------------------------------------------------------------------------- rows
def pairs_of(tokenizer, rows, args):
    """-> [(chosen, rejected)], each (ids, where its answer begins), which goes on to its end."""
    pairs = [common.pair(tokenizer, row, args.chat_template) for row in rows]
    pairs = common.fitted(pairs, args.max_length or args.tokens // 2, args.overlong)
    return [tuple((ids, mask.index(True)) for ids, mask in pair) for pair in pairs]


# ----------------------------------------------------------------------------------- what is shared
def numbers(model, reference, ids, start, end=None, prompt_too=False, weight_T=None, sampled=None):
    """What losses and metrics need of a sequence, whose answer is ids[start:end].

    reference: a model, or None. prompt_too: the prompt counts in nll, entropy and targets.
    weight_T: of each token of the answer; default: 1. sampled: which of the answer's tokens count;
    default: all."""
    logp_T, entropy_T = common.logp_and_entropy(model, ids)
    end = end or len(ids)
    at = [t for t in range(start, end) if sampled is None or sampled[t - start]]
    counted = list(range(1, end)) if prompt_too else at
    if weight_T is None:
        weight_T = torch.ones(len(at), dtype=torch.float64)
    ref_logp = 0.0
    if reference is not None:
        with torch.no_grad():
            ref_logp_T, _ = common.logp_and_entropy(reference, ids)
            ref_logp = float((ref_logp_T[at] * weight_T).sum())
    return SimpleNamespace(
        logp=(logp_T[at] * weight_T).sum(),
        ref_logp=ref_logp,
        nll=-logp_T[counted].sum(),
        entropy=entropy_T[counted].sum().item(),
        targets=len(counted),
        length=len(at),
        tokens=len(ids),
        weight_T=weight_T,
    )


def pair_metrics(chosen, rejected, loss, args):
    """Those of one pair; a step's are means over its pairs.

    Rewards are per token if all losses that compare two answers do so per token, without a
    reference."""
    comparing = set(args.loss) - {"sft"}
    per_token = bool(comparing) and comparing <= {"simpo", "orpo"}
    c, r = (
        args.beta * (x.logp.item() - x.ref_logp) / (x.length if per_token else 1)
        for x in (chosen, rejected)
    )
    return {
        "loss": loss.item(),
        "rewards/chosen": c,
        "rewards/rejected": r,
        "rewards/margins": c - r,
        "rewards/accuracies": float(c > r),
        "rewards/ties": float(c == r),
        "logps/chosen": chosen.logp.item(),
        "logps/rejected": rejected.logp.item(),
    }


def means(dicts):
    return {name: sum(d[name] for d in dicts) / len(dicts) for name in dicts[0]} if dicts else {}


def check_recorded(recorded, about, lines, first):
    """AssertionError unless a step's record has these numbers. lines: with the ranks' examples in
    the order of one process; of R ranks, rank r has the pairs (two lines) whose serial number is r
    modulo R. first: the serial of the first pair."""
    found_about, found = recorded
    for name, value in about.items():
        assert found_about[name] == pytest.approx(value, rel=1e-9), name
    ranks = 1 + max(line["rank"] for line in found)
    units = [lines[i : i + 2] for i in range(0, len(lines), 2)]
    owned = sorted(range(len(units)), key=lambda i: (first + i) % ranks)
    ordered = [line for i in owned for line in units[i]]
    assert len(found) == len(ordered)
    for mine, theirs in zip(found, ordered):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def is_due(step, every, steps):
    return step == steps or every > 0 and step % every == 0


# --------------------------------------------------------------------------------------------- twin
def of_pair(model, reference, pair, args):
    """-> numbers of the chosen and of the rejected side."""
    lengths = [len(ids) - start for ids, start in pair]
    found = []
    for ids, start in pair:
        weight_T = torch.ones(len(ids) - start, dtype=torch.float64)
        if args.fork == "ld_dpo":
            weight_T[min(lengths) :] = args.ld_alpha
        found.append(numbers(model, reference, ids, start, len(ids), "orpo" in args.loss, weight_T))
    return found


@torch.no_grad()
def wpo_weight(model, pair):
    """prod_y exp(mean_t (log pi(y_t) - log sum_v pi(v)^2))."""
    weight = 1.0
    for ids, start in pair:
        p_TV = common.logits(model, ids).softmax(-1)
        terms = []
        for t in range(start, len(ids)):
            p_V = p_TV[t - 1]
            terms.append(math.log(p_V[ids[t]]) - math.log((p_V * p_V).sum()))
        weight *= math.exp(sum(terms) / len(terms))
    return weight


def twin(args):
    tokenizer = common.tokenizer(args.model)
    model = common.with_adapters(common.language_model(args.model), args)
    reference = None
    if set(args.loss) - plain.WITHOUT_REFERENCE:
        reference = common.language_model(args.reference_model or args.model)
    train, held_out = (pairs_of(tokenizer, rows, args) for rows in common.split_rows(args))
    steps = args.steps or math.ceil(args.epochs * len(train) / args.rows)
    optimizer = common.AdamW(model, args.weight_decay)
    records = common.records(args.out)

    @torch.no_grad()
    def evaluated():
        sides = [of_pair(model, reference, pair, args) for pair in held_out]
        nll_tokens = sum(chosen.targets for chosen, _ in sides) / len(sides)
        losses = [plain.pair_loss(*pair, nll_tokens, args) for pair in sides]
        every = [pair_metrics(*pair, loss, args) for pair, loss in zip(sides, losses)]
        return {f"eval/{name}": value for name, value in means(every).items()}

    yield {"step": 0, **evaluated()}
    tokens = 0
    for step in range(1, steps + 1):
        drawn = common.drawn(len(train), args.seed, (step - 1) * args.rows, args.rows)
        pairs = [train[i] for i in drawn]
        sides = [of_pair(model, reference, pair, args) for pair in pairs]
        nll_tokens = sum(chosen.targets for chosen, _ in sides) / args.rows
        entropy = targets = 0
        each, expected = [], []
        for pair, (chosen, rejected) in zip(pairs, sides):
            loss = plain.pair_loss(chosen, rejected, nll_tokens, args)
            if args.fork == "wpo":
                loss = wpo_weight(model, pair) * loss
            (loss / args.rows).backward()
            each.append(pair_metrics(chosen, rejected, loss, args))
            for (ids, start), n in zip(pair, (chosen, rejected)):
                entropy, targets, tokens = (
                    entropy + n.entropy,
                    targets + n.targets,
                    tokens + n.tokens,
                )
                expected.append(
                    {
                        "ids": ids,
                        "mask": [int(t >= start or "orpo" in args.loss) for t in range(len(ids))],
                        "weight": [0.0] * start + n.weight_T.tolist(),
                        "length": n.length,
                        "ref_logp": n.ref_logp,
                    }
                )
        about = {"divisor": args.rows, "nll_tokens": nll_tokens}
        check_recorded(records[step], about, expected, (step - 1) * args.rows)
        grad_norm = common.clip_gradients(model, args.grad_clip)
        lr = common.learning_rate(step, steps, args.lr, args.warmup)
        optimizer.step(lr)
        if args.fork == "tr_dpo" and step % args.follow_every == 0:
            for ref, policy in zip(reference.parameters(), model.parameters()):
                ref.data += 0.6 * (policy.data - ref.data)
        line = {
            "step": step,
            **means(each),
            "entropy": entropy / targets,
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": step * args.rows / len(train),
            "num_tokens": tokens,
        }
        if is_due(step, args.eval_every, steps):
            line |= evaluated()
        yield line
    return {"": common.of_module(model)}
