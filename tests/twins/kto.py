"""The twin of train_kto.py: the loss of a whole step at once, with one backward pass."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from nanopost import plain
from twins import common, dpo

SCRIPT = "train_kto.py"
PLAIN = "--model {place}/model --reference_model {place}/near --data {place}/"
LABELLED = PLAIN + "labelled.jsonl --eval_data {place}/labelled_held_out.jsonl "
PAIRS = PLAIN + "pairs.jsonl --eval_data {place}/pairs_held_out.jsonl "
RUNS = {
    # A mean of mismatched log-ratios is above 0 in some steps of both runs and clamped in others.
    "kto": LABELLED + "--label_weights 1.4 0.6 --beta 0.3 --steps 3 --rows 5 --seed 3 --lr 4e-3 "
    "--warmup 0 --weight_decay 0.4 --grad_clip 0.04 --eval_every 2 --max_length 36 --tokens 80 "
    "--chat_template {place}/chat.jinja --checkpointing full",
    "kto of pairs": "--model {place}/near --reference_model {place}/model "
    "--data {place}/theirs.jsonl --rename better=chosen worse=rejected --holdout 6 --epochs 1.6 "
    "--rows 5 --max_length 20 --overlong drop --tokens 50 --lr 3e-3 --warmup 1 --kernels torch "
    "--checkpointing selective "
    "--reference precomputed --cache {place}/cache --to_messages --eval_rows 4",
    "bco": PAIRS + "--loss bco --sft_weight 0.4 --beta 0.4 --steps 4 --rows 5 --lr 3e-3 --warmup 0 "
    "--eval_every 1 --max_length 19",
    "lora": LABELLED + "--steps 3 --rows 5 --lr 2e-2 --warmup 0 --lora 3 --lora_alpha 5 --rslora "
    "--lora_targets q_proj v_proj",
    # No step of these holds a pair twice: its slope would depend on how a sort breaks the tie.
    "aot": PAIRS + "--loss aot --smoothing 0.2 --seed 4 --steps 3 --rows 5 --lr 3e-3 --warmup 0 "
    "--reference_model {place}/other --reference precomputed --cache {place}/cache",
    "aot_unpaired": PAIRS + "--loss aot_unpaired --smoothing 0.1 --sft_weight 0.3 --seed 4 "
    "--steps 3 --rows 5 --lr 3e-3 --warmup 0 --reference precomputed --cache {place}/cache",
}
METRICS = dpo.METRICS


# ------------------------------------------------------------------------------------------- losses
def kto(sides, label_P, args):
    """sides: (a row's own sequence, the mismatched one)."""
    mismatched = [r.logp.item() - r.ref_logp for _, r in sides]
    kl = max(0.0, sum(mismatched) / len(mismatched))
    good, bad = args.label_weights
    losses = []
    for (own, _), label in zip(sides, label_P):
        z = args.beta * (own.logp - own.ref_logp - kl)
        losses.append(good * (1 - torch.sigmoid(z)) if label else bad * (1 - torch.sigmoid(-z)))
    return losses


def ratio(side):
    return side.logp - side.ref_logp


def coupled(sides, label_P, boundary, args):
    """--loss of each pair, from all pairs of a step."""
    if args.loss == "kto":
        return kto(sides, label_P, args)
    if args.loss == "bco":
        losses = []
        for chosen, rejected in sides:
            good = args.beta * ratio(chosen) - boundary
            bad = args.beta * ratio(rejected) - boundary
            losses.append(-plain.log_sigmoid(good) - plain.log_sigmoid(-bad))
        return losses
    if args.loss == "aot":  # quantiles of margins: the policy's and the reference's
        upper = sorted(c.logp - r.logp for c, r in sides)
        lower = sorted(c.ref_logp - r.ref_logp for c, r in sides)
    else:  # quantiles of log-ratios: of chosen answers and of rejected ones
        upper = sorted(ratio(c) for c, _ in sides)
        lower = sorted(ratio(r) for _, r in sides)
    return [plain.smoothed(args.beta * (a - b), args.smoothing) for a, b in zip(upper, lower)]


def total_losses(sides, label_P, boundary, args):
    """With --sft_weight: the nll of chosen answers, per token of a mean chosen answer."""
    losses = coupled(sides, label_P, boundary, args)
    mean_targets = sum(chosen.targets for chosen, _ in sides) / len(sides)
    for i, (chosen, _) in enumerate(sides):
        if args.sft_weight:
            losses[i] = losses[i] + args.sft_weight * chosen.nll / mean_targets
    return losses


# --------------------------------------------------------------------------------------------- rows
def labelled(tokenizer, rows, args):
    """-> [(ids, start, end, label)], cut to --max_length; the answer is ids[start:end].

    A pair is two rows. A newline that a template writes after the answer stays."""
    every = []
    for row in rows:
        if "chosen" in row:
            sides = common.pair(tokenizer, row, args.chat_template)
            every += [(*side, label) for side, label in zip(sides, (True, False))]
        else:
            conversation = row["prompt"] + row["completion"]
            turns = [len(row["prompt"])]
            side = common.chat(tokenizer, conversation, turns, args.chat_template)
            every.append((*side, row["label"]))
    longest = args.max_length or args.tokens // 2
    found = []
    for ids, mask, label in every:
        start, end = mask.index(True), mask.index(True) + sum(mask)
        if start < longest and not (args.overlong == "drop" and len(ids) > longest):
            found.append((ids[:longest], start, min(end, longest), label))
    return found


def with_mismatches(rows, longest):
    """-> [(row, mismatch, label)], both (ids, start, end).

    A mismatch is the row's prompt before the answer of another row, the next one in a permutation
    that no seed changes."""
    order = np.random.default_rng((0, 0)).permutation(len(rows)).tolist()
    found = []
    for i, (ids, start, end, label) in enumerate(rows):
        other_ids, other_start, other_end, _ = rows[order[(order.index(i) + 1) % len(order)]]
        mixed = (ids[:start] + other_ids[other_start:])[:longest]
        mixed_end = min(longest, start + other_end - other_start)
        found.append(((ids, start, end), (mixed, start, mixed_end), label))
    return found


def units_of(tokenizer, rows, args):
    """-> [(chosen, rejected, label)]; a pair has the label 1."""
    if args.loss == "kto":
        rows = labelled(tokenizer, rows, args)
        return with_mismatches(rows, args.max_length or args.tokens // 2)
    pairs = dpo.pairs_of(tokenizer, rows, args)
    return [(*((ids, start, len(ids)) for ids, start in pair), 1) for pair in pairs]


# ------------------------------------------------------------------------------------------ metrics
def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def step_metrics(sides, label_P, losses, args):
    """Means over pairs. Of rows with labels: over good ones (chosen), over bad ones (rejected), and
    over all pairs of a good and a bad one (accuracies)."""
    if args.loss != "kto":
        as_list = SimpleNamespace(beta=args.beta, loss=[args.loss])
        every = zip(sides, losses)
        return dpo.means([dpo.pair_metrics(*pair, loss, as_list) for pair, loss in every])
    own = [
        SimpleNamespace(reward=args.beta * (x.logp.item() - x.ref_logp), logp=x.logp.item())
        for x, _ in sides
    ]
    good = [x for x, label in zip(own, label_P) if label]
    bad = [x for x, label in zip(own, label_P) if not label]
    found = {
        "loss": mean(loss.item() for loss in losses),
        "rewards/chosen": mean(x.reward for x in good),
        "rewards/rejected": mean(x.reward for x in bad),
        "rewards/accuracies": mean(x.reward > y.reward for x in good for y in bad),
        "rewards/ties": mean(x.reward == y.reward for x in good for y in bad),
        "logps/chosen": mean(x.logp for x in good),
        "logps/rejected": mean(x.logp for x in bad),
    }
    return {name: value for name, value in found.items() if value is not None}


# --------------------------------------------------------------------------------------------- twin
def twin(args):
    tokenizer = common.tokenizer(args.model)
    model = common.with_adapters(common.language_model(args.model), args)
    reference = common.language_model(args.reference_model or args.model)
    train, held_out = (units_of(tokenizer, rows, args) for rows in common.split_rows(args))
    steps = args.steps or math.ceil(args.epochs * len(train) / args.rows)
    optimizer = common.AdamW(model, args.weight_decay)
    records = common.records(args.out)
    rewards = []  # of all sequences so far

    def boundary():
        return mean(rewards) or 0.0

    def sides_of(units):
        both = [[dpo.numbers(model, reference, *side) for side in unit[:2]] for unit in units]
        return both, [label for _, _, label in units]

    @torch.no_grad()
    def evaluated():
        sides, label_P = sides_of(held_out)
        losses = total_losses(sides, label_P, boundary(), args)
        found = step_metrics(sides, label_P, losses, args)
        return {f"eval/{name}": value for name, value in found.items()}

    yield {"step": 0, **evaluated()}
    tokens = 0
    for step in range(1, steps + 1):
        drawn = common.drawn(len(train), args.seed, (step - 1) * args.rows, args.rows)
        units = [train[i] for i in drawn]
        sides, label_P = sides_of(units)
        for side in (x for pair in sides for x in pair):
            rewards.append(args.beta * (side.logp.item() - side.ref_logp))
            side.logp.retain_grad()
        losses = total_losses(sides, label_P, boundary(), args)
        (sum(losses) / args.rows).backward()
        entropy = targets = 0
        expected = []
        for (*pair, label), both in zip(units, sides):
            for (ids, start, end), n in zip(pair, both):
                slope = 0.0 if n.logp.grad is None else n.logp.grad.item() * args.rows
                line = {
                    "ids": ids,
                    "mask": [int(start <= t < end) for t in range(len(ids))],
                    "length": n.length,
                    "ref_logp": n.ref_logp,
                    "slope": slope,
                }
                if args.loss == "kto":
                    line["label"] = int(label)
                expected.append(line)
                if slope:  # what the loss does not depend on is not trained
                    entropy, targets, tokens = (
                        entropy + n.entropy,
                        targets + n.targets,
                        tokens + n.tokens,
                    )
        about = {"divisor": args.rows}
        dpo.check_recorded(records[step], about, expected, (step - 1) * args.rows)
        grad_norm = common.clip_gradients(model, args.grad_clip)
        lr = common.learning_rate(step, steps, args.lr, args.warmup)
        optimizer.step(lr)
        line = {
            "step": step,
            **step_metrics(sides, label_P, losses, args),
            "entropy": entropy / targets,
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": step * args.rows / len(train),
            "num_tokens": tokens,
        }
        if dpo.is_due(step, args.eval_every, steps):
            line |= evaluated()
        yield line
    return {"": common.of_module(model)}
