"""The twin of train_rm.py."""

import math

import numpy as np
import torch

from twins import common

SCRIPT = "train_rm.py"
RUNS = {
    "truncated": "--model {place}/model --data {place}/pairs.jsonl --eval_data "
    "{place}/pairs_held_out.jsonl --steps 3 --rows 5 --seed 3 --lr 4e-3 --warmup 0 --tokens 130 "
    "--weight_decay 0.4 --grad_clip 0.6 --eval_every 2 --max_length 30 --centre 0.07 "
    "--chat_template {place}/lines.jinja --checkpointing full --to_messages --eval_rows 2",
    "dropped": "--model {place}/rm --data {place}/theirs.jsonl --rename better=chosen "
    "worse=rejected --holdout 3 --epochs 2.7 --rows 3 --warmup 2 --overlong drop --max_length 22 "
    "--tokens 46 --grad_clip 0 --lr 2e-3 --kernels torch --checkpointing selective",
    "nothing held out": "--model {place}/model --data {place}/pairs.jsonl --holdout 0 --steps 3 "
    "--rows 5 --tokens 60 --lr 1e-3",
    "lora": "--model {place}/model --data {place}/pairs.jsonl --holdout 3 --steps 3 --rows 5 "
    "--tokens 60 --lr 8e-3 --warmup 0 --seed 2 --lora 2 --lora_alpha 7 --rslora --lora_targets "
    "gate_proj k_proj",
}
METRICS = {
    *("eval/loss", "eval/accuracy", "eval/margin", "eval/score/q05", "eval/score/q50"),
    *("eval/score/q95", "loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"),
    *("grad_norm", "lr", "epoch", "num_tokens"),
}


def examples(tokenizer, rows, args):
    """All rows that can be used -> [(chosen ids, rejected ids, margin)]."""
    longest = args.max_length or args.tokens // 2
    found = []
    for row in rows:
        sides = common.pair(tokenizer, row, args.chat_template)
        for (chosen, _), (rejected, _) in common.fitted([sides], longest, args.overlong):
            found.append((chosen, rejected, row.get("margin", 0.0)))
    return found


def judged(model, pair, centre):
    """-> (loss, score of chosen, score of rejected)."""
    chosen, rejected = (common.score(model, ids) for ids in pair[:2])
    preferred = torch.log1p(torch.exp(-(chosen - rejected - pair[2])))
    return preferred + centre * (chosen + rejected) ** 2, chosen.item(), rejected.item()


def twin(args):
    tokenizer = common.tokenizer(args.model)
    model = common.with_adapters(common.scalar_model(args.model), args)
    train, held_out = (examples(tokenizer, rows, args) for rows in common.split_rows(args))
    steps = args.steps or math.ceil(args.epochs * len(train) / args.rows)
    optimizer = common.AdamW(model, args.weight_decay)
    records = common.records(args.out)

    @torch.no_grad()
    def evaluated():
        if not held_out:
            return {}
        judgements = [judged(model, pair, args.centre) for pair in held_out]
        scores = [score for _, *both in judgements for score in both]
        low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
        return {
            "eval/loss": np.mean([loss.item() for loss, _, _ in judgements]),
            "eval/accuracy": np.mean([chosen > rejected for _, chosen, rejected in judgements]),
            "eval/margin": np.mean([chosen - rejected for _, chosen, rejected in judgements]),
            "eval/score/q05": low,
            "eval/score/q50": middle,
            "eval/score/q95": high,
        }

    yield {"step": 0, **evaluated()}
    tokens = 0
    for step in range(1, steps + 1):
        drawn = common.drawn(len(train), args.seed, (step - 1) * args.rows, args.rows)
        batch = [train[i] for i in drawn]
        losses, chosen_scores, rejected_scores = [], [], []
        for pair in batch:
            loss, chosen, rejected = judged(model, pair, args.centre)
            (loss / len(batch)).backward()
            losses.append(loss.item())
            chosen_scores.append(chosen)
            rejected_scores.append(rejected)
        check_record(records[step], batch, chosen_scores, rejected_scores)
        grad_norm = common.clip_gradients(model, args.grad_clip)
        lr = common.learning_rate(step, steps, args.lr, args.warmup)
        optimizer.step(lr)
        tokens += sum(len(chosen) + len(rejected) for chosen, rejected, _ in batch)
        difference = np.array(chosen_scores) - np.array(rejected_scores)
        line = {
            "step": step,
            "loss": np.mean(losses),
            "accuracy": np.mean(difference > 0),
            "margin": np.mean(difference),
            "mean_reward": np.mean(chosen_scores + rejected_scores),
            "min_reward": min(chosen_scores + rejected_scores),
            "max_reward": max(chosen_scores + rejected_scores),
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": step * args.rows / len(train),
            "num_tokens": tokens,
        }
        if step == steps or args.eval_every and step % args.eval_every == 0:
            line |= evaluated()
        yield line
    return {"": common.of_module(model)}


def check_record(record, batch, chosen_scores, rejected_scores):
    """What a step recorded is the pairs that the twin takes, with the twin's scores."""
    about, lines = record
    assert about["divisor"] == len(batch)
    found = []
    for chosen, rejected in zip(lines[0::2], lines[1::2], strict=True):
        assert chosen["margin"] == rejected["margin"]
        scores = chosen["score"], rejected["score"]
        found.append((chosen["ids"], rejected["ids"], chosen["margin"], *scores))
    scores = zip(chosen_scores, rejected_scores)
    expected = [(*pair, *both) for pair, both in zip(batch, scores)]
    for mine, theirs in zip(sorted(found), sorted(expected), strict=True):
        assert mine[:3] == theirs[:3]
        assert np.allclose(mine[3:], theirs[3:], rtol=0, atol=1e-9)
