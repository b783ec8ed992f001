"""The twin of train_sft.py: which rows a step takes, which of their tokens, and what they give."""

import math
from string import ascii_uppercase

import numpy as np
import torch

from twins import common

SCRIPT = "train_sft.py"
PLAIN = "--model {place}/model --data {place}/sft.jsonl --eval_data {place}/sft_held_out.jsonl "
RUNS = {
    "truncated": PLAIN + "--steps 3 --rows 5 --seed 3 --lr 4e-3 --warmup 0 --weight_decay 0.4 "
    "--grad_clip 0.6 --eval_every 2 --max_length 64 --tokens 140 --train_on last "
    "--chat_template {place}/lines.jinja --checkpointing full --to_messages --eval_rows 4",
    "split": PLAIN + "--steps 6 --bins 3 --tokens 70 --max_length 25 --overlong split --lr 2e-3 "
    "--warmup 2 --train_on all --loss dft --kernels torch --grad_clip 0.01 "
    "--checkpointing selective",
    "dropped": "--model {place}/model --data {place}/dialogs.jsonl --rename dialog=messages "
    "--holdout 3 --epochs 1.4 --rows 4 --seed 1 --max_length 50 --overlong drop --tokens 120 "
    "--train_on completion",
    "bins": "--model {place}/model --data {place}/dialogs.jsonl --rename dialog=messages "
    "--eval_data {place}/dialogs.jsonl --epochs 1.3 --bins 1 --tokens 80 --max_length 45 "
    "--lr 1e-3 --seed 5 --grad_clip 0",
    "lora": PLAIN + "--steps 3 --rows 5 --lr 2e-2 --warmup 0 --weight_decay 0.4 --lora 3 "
    "--lora_alpha 5 --rslora --lora_targets q_proj down_proj --checkpointing full",
    "experts": PLAIN + "--model {place}/experts --steps 3 --rows 5 --lr 4e-3 --tokens 90",
    "compiled": PLAIN + "--steps 3 --compile --dtype fp32",
    "bf16": PLAIN + "--steps 2 --lr 1e-3 --dtype bf16",
    "fork muon": "--model {place}/model --data {place}/sft.jsonl --holdout 0 "
    "--steps 3 --rows 5 --lr 3e-3 --warmup 0 --weight_decay 0.3",
    "fork multiple_choice": "--model {place}/model --data {place}/questions.jsonl --holdout 2 "
    "--steps 3 --rows 3 --lr 3e-3",
}
METRICS = {
    *("eval/loss", "eval/entropy", "loss", "entropy", "grad_norm", "lr", "epoch", "num_tokens"),
}


# --------------------------------------------------------------------------------------------- rows
def trained_turns(row, messages, train_on):
    """The indices of the assistant messages that are targets."""
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    if "prompt" in row:
        turns = [k for k in turns if k >= len(row["prompt"])]
    elif train_on == "completion":
        last_question = max(k for k, m in enumerate(messages) if m["role"] == "user")
        turns = [k for k in turns if k > last_question]
    if train_on == "last":
        return turns[-1:]
    return turns


def example(tokenizer, row, args):
    """A row -> (ids, mask)."""
    text = row.get("text") or row.get("prompt")
    if isinstance(text, str):
        before = [] if "text" in row else common.encoded(tokenizer, text)
        after = row["text"] if "text" in row else row["completion"]
        after = common.encoded(tokenizer, after) + [tokenizer.eos_token_id]
        return before + after, [args.train_on == "all"] * len(before) + [True] * len(after)
    if args.fork == "multiple_choice":
        options = [f"{x}. {option}" for x, option in zip(ascii_uppercase, row["options"])]
        question = "\n".join([row["question"], *options])
        answer = ascii_uppercase[row["answer"]]
        messages = [common.message("user", question), common.message("assistant", answer)]
    else:
        messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    turns = trained_turns(row, messages, args.train_on)
    ids, mask = common.chat(tokenizer, messages, turns, args.chat_template)
    if args.train_on == "all":
        mask = [True] * len(ids)
    return ids, mask


def examples(tokenizer, rows, args):
    """All rows, cut to --max_length. What has no target is left out: nothing predicts the first
    token. The parts of a split row overlap by one token, which the second does not train."""
    longest = min(args.max_length or args.tokens, args.tokens)
    found = []
    for row in rows:
        ids, mask = example(tokenizer, row, args)
        cuts = [0]
        if len(ids) > longest and args.overlong == "split":
            cuts = range(0, len(ids) - 1, longest - 1)
        if len(ids) > longest and args.overlong == "drop":
            cuts = []
        for cut in cuts:
            if any(mask[cut : cut + longest][1:]):
                found.append((ids[cut : cut + longest], mask[cut : cut + longest]))
    return found


def epoch_of_bins(lengths, size, seed, epoch):
    """The bins of an epoch, in their order. Best fit: rows in random order, longest first, each
    into the fullest bin with room for it; of two, into the one that was filled last."""
    random = np.random.default_rng((seed, epoch))
    order = sorted(random.permutation(len(lengths)).tolist(), key=lambda i: -lengths[i])
    bins, filled_at = [], []
    for moment, i in enumerate(order):
        room = [size - sum(lengths[j] for j in bin) for bin in bins]
        fits = [b for b in range(len(bins)) if room[b] >= lengths[i]]
        if not fits:
            bins.append([])
            filled_at.append(moment)
            fits = [len(bins) - 1]
            room.append(size)
        best = min(fits, key=lambda b: (room[b], -filled_at[b]))
        bins[best].append(i)
        filled_at[best] = moment
    return [bins[b] for b in random.permutation(len(bins))]


def rows_of_step(lengths, step, args):
    if not args.bins:
        return common.drawn(len(lengths), args.seed, (step - 1) * args.rows, args.rows)
    found = []
    per_epoch = len(epoch_of_bins(lengths, args.tokens, args.seed, 0))
    for k in range((step - 1) * args.bins, step * args.bins):
        bins = epoch_of_bins(lengths, args.tokens, args.seed, k // per_epoch)
        found += bins[k % per_epoch]
    return found


# --------------------------------------------------------------------------------------------- twin
class Muon:
    """AdamW, but torch's Muon for the matrices of the blocks."""

    def __init__(self, module, weight_decay):
        self.matrices = [p for n, p in module.named_parameters() if ".layers." in n and p.ndim == 2]
        self.muon = torch.optim.Muon(
            self.matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = common.AdamW(module, weight_decay)

    def step(self, rate):
        self.muon.param_groups[0]["lr"] = rate
        self.muon.step()
        for p in self.matrices:
            p.grad = None
        self.adamw.step(rate)


def twin(args):
    tokenizer = common.tokenizer(args.model)
    model = common.with_adapters(common.language_model(args.model), args)
    train_rows, eval_rows = common.split_rows(args)
    train, held_out = (examples(tokenizer, rows, args) for rows in (train_rows, eval_rows))
    lengths = [len(ids) for ids, _ in train]
    per_epoch, per_step = len(train), args.rows
    if args.bins:
        per_epoch, per_step = len(epoch_of_bins(lengths, args.tokens, args.seed, 0)), args.bins
    steps = args.steps or math.ceil(args.epochs * per_epoch / per_step)
    optimizer = (Muon if args.fork == "muon" else common.AdamW)(model, args.weight_decay)
    records = common.records(args.out)

    def evaluated():
        loss = entropy = targets = 0
        for ids, mask in held_out:
            with torch.no_grad():
                logp_T, entropy_T = common.logp_and_entropy(model, ids)
            for t in range(1, len(ids)):
                if mask[t]:
                    loss, entropy, targets = loss - logp_T[t], entropy + entropy_T[t], targets + 1
        if not targets:
            return {}
        return {"eval/loss": loss / targets, "eval/entropy": entropy / targets}

    yield {"step": 0, **evaluated()}
    tokens = 0
    for step in range(1, steps + 1):
        batch = [train[i] for i in rows_of_step(lengths, step, args)]
        targets = sum(sum(mask[1:]) for _, mask in batch)
        about, recorded = records[step]
        assert about["divisor"] == targets
        assert sorted((line["ids"], line["mask"]) for line in recorded) == sorted(batch)
        loss_sum = entropy_sum = 0.0
        for ids, mask in batch:
            logp_T, entropy_T = common.logp_and_entropy(model, ids)
            loss = 0.0
            for t in range(1, len(ids)):
                if mask[t]:
                    weight = logp_T[t].exp().item() if args.loss == "dft" else 1.0
                    loss = loss - weight * logp_T[t]
                    entropy_sum += entropy_T[t].item()
            (loss / targets).backward()
            loss_sum += loss.item()
        grad_norm = common.clip_gradients(model, args.grad_clip)
        lr = common.learning_rate(step, steps, args.lr, args.warmup)
        optimizer.step(lr)
        tokens += sum(len(ids) for ids, _ in batch)
        line = {
            "step": step,
            "loss": loss_sum / targets,
            "entropy": entropy_sum / targets,
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": step * per_step / per_epoch,
            "num_tokens": tokens,
        }
        if step == steps or args.eval_every and step % args.eval_every == 0:
            line |= evaluated()
        yield line
    return {"": common.of_module(model)}
