"""Reward modelling: learn a score that is higher for the preferred answer (Bradley-Terry).

    loss = - sum_p log sigmoid(r(x, y_chosen) - r(x, y_rejected) - margin_p) / P
           + centre sum_p (r(x, y_chosen) + r(x, y_rejected))^2 / P            P: pairs of the step

r is a linear head on the last token of a packed sequence. --centre keeps scores near 0
(2312.09244); a column "margin" says how much better the chosen answer is (2307.09288). The output
folder is a transformers ...ForSequenceClassification with one label.

    python train_rm.py --model out/sft --data pairs.jsonl
    torchrun --nproc_per_node 8 train_rm.py --model out/sft --data pairs.jsonl --epochs 1
"""

import math
import time

import numpy as np
import torch

from nanopost import cli, dist, hf, optim, packing, pairs, preference, rows
from nanopost.cli import at_least
from nanopost.forward import batches, check_finite
from nanopost.plan import end_dry_run
from nanopost.report import marked_text
from nanopost.tape import Tape
from nanopost.terminal import progress
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: P pairs, S sequences: 2p is the chosen one of pair p, 2p + 1 the rejected one.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, out="out/rm", lr=1e-5, weight_decay=0.01)
cli.add_pair_flags(parser)
add = parser.add_argument
add("--centre", type=at_least(0.0), default=0.0, help="weight of a pair's squared score sum")
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
tokenizer = Tokenizer.load(args.model, args.chat_template)
# transformers scores the last non-padding token: if answers end with the padding token, no token
# may count as padding.
pad_id = None if tokenizer.pad_id in tokenizer.stop_ids else tokenizer.pad_id
model = hf.load_scalar_model(
    args.model, world.device, shard=cli.shard(args, world), new_head=True, pad_id=pad_id
)

train_rows, eval_rows = rows.load(
    args.data, args.eval_data, args.holdout, args.rename, rows.pair, args.to_messages
)
eval_rows = eval_rows[: args.eval_rows]
max_length = min(args.max_length or args.tokens // 2, model.config.max_positions)


def encode(rows_P):
    """Rows -> (pairs of examples with the column margin, counts of what was cut or dropped)."""
    pairs_P = [tokenizer.pair(row) for row in progress(rows_P, "pairs encoded")]
    for row, pair in zip(rows_P, pairs_P):
        for e in pair:
            e.columns["margin"] = rows.number(row, "margin", default=0.0)
    return pairs.fit_to(pairs_P, max_length, args.overlong)


train_pairs, cut = encode(train_rows)
eval_pairs, eval_cut = encode(eval_rows)
lengths = [len(chosen) + len(rejected) for chosen, rejected in train_pairs]
packing.pack(lengths, args.tokens)  # InputError now if a pair does not fit into a micro-batch
per_epoch = len(train_pairs)
args.steps = args.steps or math.ceil(args.epochs * per_epoch / args.rows)

optimizer = optim.adamw(model, args.weight_decay)
show = ["loss", "accuracy", "margin", "grad_norm", "lr", "tokens_per_second"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0}
state = run.start(model, optimizer, fresh, args.resume, args.overwrite, fingerprint(tokenizer))
run.say(check_stage(args.model, tokenizer))
run.say(tokenizer.doubts(train_rows))
run.say(
    f"{len(train_pairs):,} pairs, {len(eval_pairs):,} held out; the first, answers between » and «:"
)
run.say("\n".join(marked_text(e, tokenizer) for e in train_pairs[0]))
run.say(f"cut or dropped: {packing.counted(cut)}; held out: {packing.counted(eval_cut)}")
epochs = args.steps * args.rows / per_epoch
run.say(
    f"each step takes {args.rows} of the {per_epoch:,} pairs of an epoch: {args.steps:,} steps, "
    f"{epochs:.3g} epochs"
)


def forward(batch):
    """Scores and losses of a micro-batch of pairs -> (score_S, loss_P); a dummy has losses of 0."""
    score_S = model(batch)[batch.last_S]
    loss_P = preference.reward_model_loss(score_S, batch["margin"][0::2], args.centre)
    return score_S, loss_P * (not batch.dummy)


@torch.no_grad()
def evaluate():
    """Held-out pairs: loss, accuracy, margin, and quantiles of all scores."""
    if not eval_pairs:
        return {}
    meter, score_P2 = dist.Meter(), []
    for batch in batches(model, eval_pairs[world.rank :: world.size], args.tokens, world.device):
        score_S, loss_P = forward(batch)
        if not batch.dummy:
            meter.add(len(loss_P), **{"eval/loss": loss_P.sum()})
            score_P2 += score_S.view(-1, 2).tolist()
    score_P2 = np.array(sorted(dist.gather(score_P2)))  # the same order on any number of ranks
    margin_P = score_P2[:, 0] - score_P2[:, 1]
    low, middle, high = np.quantile(score_P2, [0.05, 0.5, 0.95]).tolist()
    return {
        **meter.means(),
        "eval/accuracy": float((margin_P > 0).mean()),
        "eval/margin": float(margin_P.mean()),
        "eval/score/q05": low,
        "eval/score/q50": middle,
        "eval/score/q95": high,
    }


if args.dry_run:
    end_dry_run("rm", vars(args), world, train_pairs)

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
tape = Tape(args.record)
standstill = optim.Standstill(0 if run.resumed else args.steps)
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- update
    began = time.perf_counter()
    indices, _ = packing.share(per_epoch, args.seed, state["consumed"], args.rows, world)
    state["consumed"] += args.rows
    step_pairs = [train_pairs[i] for i in indices]
    meter, examples, scores = dist.Meter(), [], []
    for batch in batches(model, step_pairs, args.tokens, world.device):
        score_S, loss_P = forward(batch)
        (loss_P.sum() / args.rows).backward()
        tape.add(batch, loss=loss_P.sum())
        meter.add(batch.num_examples // 2, loss=loss_P.sum())
        examples += batch.examples
        scores.append(score_S.detach().view(-1, 2).T[:, : batch.num_examples // 2])
    grad_norm = dist.clip_grad_norm(model, args.grad_clip)
    check_finite(grad_norm, step, model, examples, tokenizer.decode)
    lr = optim.learning_rate(step, args.steps, args.lr, args.warmup)
    optim.set_learning_rate(optimizer, lr)
    tape.update(examples, grad_norm, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    # ---- log
    tokens = dist.all_sum(sum(map(len, examples)))
    state["num_tokens"] += tokens
    chosen_P, rejected_P = score_2P = torch.cat(scores, 1)
    meter.add(
        len(chosen_P),
        accuracy=(chosen_P > rejected_P).sum(),
        margin=chosen_P - rejected_P,
        mean_reward=(chosen_P + rejected_P) / 2,
    )
    each = score_2P.flatten().tolist()
    highest, minus_lowest = dist.all_max(max(each, default=-math.inf), -min(each, default=math.inf))
    metrics = {
        **meter.means(),
        "min_reward": -minus_lowest,
        "max_reward": highest,
        "grad_norm": grad_norm,
        "lr": lr,
        "epoch": state["consumed"] / per_epoch,
        "num_tokens": state["num_tokens"],
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }
    if run.due(step, args.eval_every):
        metrics |= evaluate()
    run.log(step, metrics)
    run.say(standstill.hint(grad_norm == 0, optim.NO_GRADIENT))
    if args.record:
        score_S = score_2P.T.flatten().tolist()
        run.record(step, examples, {"divisor": args.rows}, tape, score=score_S)

    # ---- save
    if run.due_save(step, args.save_every, args.save_minutes):
        run.save(step, model, optimizer, state)

# --------------------------------------------------------------------------------------------- save
files = tokenizer_files(args.model, tokenizer)
run.export(dist.full_weights(model), model.config, files, args.save_dtype)
run.finish()
