"""Reward modelling: one number for an answer, higher for those that people choose (Bradley-Terry).

    loss = - sum_p log sigmoid(r(x, y_chosen) - r(x, y_rejected) - margin_p) / P         P: pairs of the optimizer step

r is a linear head on the last token of a packed sequence. --centre adds c (r_chosen + r_rejected)^2,
which keeps scores around 0 (2312.09244); a column "margin" says how much better the chosen one is (2307.09288).
The folder written is a transformers ...ForSequenceClassification with one label.

    python train_sft.py && python train_rm.py                       # the toy: right sums above the model's own slips
    torchrun --nproc_per_node 8 train_rm.py --model out/sft --data pairs.jsonl
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanopost import checkpoint, dist, hf, optim, packing, preference, toy
from nanopost.batch import batch_of
from nanopost.cli import Help, check_numbers
from nanopost.pairs import fit
from nanopost.rows import load as load_rows
from nanopost.rows import number
from nanopost.run import Logger
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, marked_text, tokenizer_files

# N packed tokens of a micro-batch, S its sequences: 2p is the chosen one of pair p, 2p + 1 the rejected one; P pairs.
# ------------------------------------------------------------------------------------------------------- arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
add = parser.add_argument
add(
    "--model",
    default="out/sft",
    help="folder of a Hugging Face checkpoint; default out/sft, what train_sft.py writes",
)
add("--data", default="toy", help="rows: JSONL, .jsonl.gz, .json or Parquet, or toy")
add("--eval_data", help="held-out rows; without it --holdout rows of --data are kept back")
add(
    "--holdout",
    type=int,
    default=100,
    help="rows of --data kept for evaluation, if there is no --eval_data",
)
add(
    "--rename",
    nargs="*",
    default=[],
    metavar="THEIRS=OURS",
    help="columns, such as better=chosen worse=rejected",
)
add("--out", default="out/rm", help="folder of the run; the trained model is written here")
add("--chat_template", help="a Jinja file used instead of the model's own template")
add("--seed", type=int, default=0)
add("--device", default="auto", choices=["auto", "cpu", "cuda"])
add(
    "--dtype",
    default="auto",
    choices=["auto", "fp32", "bf16"],
    help="to compute in; auto: bf16 on CUDA, else fp32",
)
add("--compile", action="store_true", help="torch.compile each block")
add("--checkpointing", action="store_true", help="recompute activations in the backward pass")
add(
    "--kernels",
    default="auto",
    choices=["auto", "torch"],
    help="auto: Triton for log-probs on CUDA; torch: none",
)
add("--tokens", type=int, default=8192, help="tokens of a micro-batch, at most")
add("--lr", type=float, help="peak learning rate; default 1e-5, for the toy 5e-4")
add("--schedule", default="linear", choices=["constant", "linear", "cosine"])
add("--warmup", type=int, default=20, help="steps from 0 to --lr, at most half of the run")
add("--weight_decay", type=float, default=0.01)
add("--betas", type=float, nargs=2, default=[0.9, 0.95])
add("--grad_clip", type=float, default=1.0, help="largest L2 norm of the gradient; 0: any")
add("--eval_every", type=int, default=100, help="steps; 0: only before and after")
add("--save_every", type=int, default=100, help="steps between checkpoints to resume from; 0: none")
add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
add("--overwrite", action="store_true", help="replace the run that --out holds")
add("--verbose", action="store_true", help="say when each phase begins")
# Of this algorithm alone:
add("--steps", type=int, default=800, help="optimizer steps")
add("--epochs", type=float, help="instead of --steps: times over the pairs")
add("--rows", type=int, default=64, help="pairs of an optimizer step, over all ranks")
add("--centre", type=float, default=0.0, help="weight of the squared sum of a pair's scores")
add("--max_length", type=int, help="longest side of a pair in tokens; default: half of --tokens")
add(
    "--overlong",
    default="truncate",
    choices=["truncate", "drop"],
    help="what becomes of longer pairs",
)
args = parser.parse_args()
args.lr = args.lr if args.lr is not None else 5e-4 if args.data == "toy" else 1e-5

# ------------------------------------------------------------------------------------------------------- processes
world = dist.init(args.device)
check_numbers(vars(args))
torch.manual_seed(args.seed)
bf16 = args.dtype == "bf16" or (args.dtype == "auto" and world.device.type == "cuda")

# --------------------------------------------------------------------------------------------- tokenizer and model
tokenizer = Tokenizer.load(args.model, args.chat_template)
stage = check_stage(args.model, tokenizer)
shard = partial(
    dist.shard,
    world=world,
    bf16=bf16,
    checkpointing=args.checkpointing,
    compile=args.compile,
    kernels=args.kernels,
)
pad_id = None if tokenizer.pad_id in tokenizer.stop_ids else tokenizer.pad_id
model = hf.load_scalar_model(args.model, world.device, shard=shard, new_head=True, pad_id=pad_id)

# ------------------------------------------------------------------------------------------------------------ data
if args.data == "toy":
    toy.check(tokenizer, args.model)
    rows, eval_rows = (toy.pair_rows(args.model, held_out) for held_out in (False, True))
else:
    rows, eval_rows = load_rows(args.data, args.eval_data, args.holdout, args.rename)


def encode(rows):
    pairs = []
    for row in rows:
        pairs.append(tokenizer.pair(row))
        for e in pairs[-1]:
            e.columns["margin"] = number(row, "margin", default=0.0)
    return fit(
        pairs, args.tokens // 2 if args.max_length is None else args.max_length, args.overlong
    )


pairs, cut = encode(rows)
eval_pairs, eval_cut = encode(eval_rows)
lengths = [len(chosen) + len(rejected) for chosen, rejected in pairs]
per_step, unit = args.rows, "pairs"
per_epoch, micro_batches_of_step = packing.by_rows(lengths, args.tokens, args.seed)
args.steps = math.ceil(args.epochs * per_epoch / per_step) if args.epochs else args.steps

# ------------------------------------------------------------------------------------------------------- optimizer
optimizer = optim.adamw(model, args.weight_decay, args.betas)
found = checkpoint.to_resume(args) if args.resume else None
state = checkpoint.load(found, model, optimizer) if found else {"step": 0, "consumed": 0, "seen": 0}
shown = ["loss", "accuracy", "margin", "grad_norm", "lr", "tokens_per_second"]
logger = Logger(args.out, world.rank, args.steps, shown, args.verbose)
replace = (
    args.overwrite or args.resume and not Path(args.out, "config.json").exists()
)  # killed before a checkpoint
logger.open(
    state["step"] if found else None, replace, {"args": vars(args), **fingerprint(tokenizer)}
)
for change in checkpoint.changed_arguments(state.get("args", vars(args)), vars(args)):
    logger.say(f"resumed with another {change}")
logger.say(stage)
logger.say(
    f"{args.data}: {len(pairs):,} pairs, {len(eval_pairs):,} held out; the first, with » and « around answers:\n"
    + "\n".join(marked_text(e, tokenizer) for e in pairs[0])
)
logger.say(
    f"cut, left out or doubtful: {packing.counted(cut)}; held out: {packing.counted(eval_cut)}"
)
logger.say(f"a step is {per_step} of the {per_epoch:,} {unit} of an epoch")


def forward(part, pairs):
    """Scores of the pairs with these indices and their losses -> (score_2P, loss_P, tokens); no pairs sum to 0."""
    batch = batch_of([e for i in part for e in pairs[i]], world.device)
    score_S = model(batch)[batch.cu_seqlens[1:].long() - 1]
    loss_P = preference.reward_model_loss(score_S, batch["margin"][0::2], args.centre)
    return (
        score_S.detach().view(-1, 2).T[:, : len(part)],
        loss_P * (not batch.dummy),
        len(batch.token_N),
    )


@torch.no_grad()
def evaluate():
    """Held-out pairs: loss, accuracy, margin, and quantiles of all scores."""
    if not eval_pairs:
        return {}
    mine, loss, scores = eval_pairs[world.rank :: world.size], 0.0, []
    for part in dist.even(packing.micro_batches([len(a) + len(b) for a, b in mine], args.tokens)):
        score_2P, loss_P, _ = forward(part, mine)
        loss += float(loss_P.sum())
        scores += score_2P.T.tolist()
    score_P2 = np.array(dist.gather(scores))
    margin_P = score_P2[:, 0] - score_P2[:, 1]
    quantiles = zip((5, 50, 95), np.quantile(score_P2, (0.05, 0.5, 0.95)).tolist())
    return {
        **dist.means({"eval/loss": (loss, len(mine))}),
        "eval/accuracy": float((margin_P > 0).mean()),
        "eval/margin": float(margin_P.mean()),
        **{f"eval/score/q{q:02d}": value for q, value in quantiles},
    }


# ------------------------------------------------------------------------------------------------------------ loop
consumed, seen = state["consumed"], state["seen"]
state["args"] = vars(args)
if not found:
    logger.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- update
    logger.phase("update", step)
    began = time.perf_counter()
    micro_batches = micro_batches_of_step(consumed, per_step, world.rank, world.size)
    consumed += per_step
    loss_sum, tokens, scores = 0.0, 0, []
    for part in micro_batches:
        score_2P, loss_P, count = forward(part, pairs)
        (
            loss_P.sum() * world.size / per_step
        ).backward()  # FSDP averages gradients over ranks: world.size undoes it
        loss_sum += float(loss_P.detach().sum())
        tokens += count
        scores.append(score_2P)
    grad_norm = dist.clip_grad_norm(model, args.grad_clip)
    lr = optim.learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
    optim.set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    # ---- log
    chosen_P, rejected_P = torch.cat(scores, 1)
    (tokens,) = dist.all_sum(tokens)
    seen += tokens
    count = len(chosen_P)
    low, high = dist.all_max(
        *(
            max((sign * torch.cat(scores, 1)).flatten().tolist(), default=-math.inf)
            for sign in (-1, 1)
        )
    )
    metrics = {
        **dist.means(
            {
                "loss": (loss_sum, count),
                "accuracy": ((chosen_P > rejected_P).sum(), count),
                "margin": ((chosen_P - rejected_P).sum(), count),
                "mean_reward": ((chosen_P + rejected_P).sum(), 2 * count),
            }
        ),
        "min_reward": -low,
        "max_reward": high,
        "grad_norm": grad_norm,
        "lr": lr,
        "epoch": consumed / per_epoch,
        "num_tokens": seen,
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }
    if step == args.steps or args.eval_every and step % args.eval_every == 0:
        logger.phase("eval", step)
        metrics |= evaluate()
    logger.log(step, metrics)

    # ---- save
    if args.save_every and step % args.save_every == 0 and step < args.steps:
        logger.phase("save", step)
        checkpoint.save(
            args.out, step, model, optimizer, state | {"consumed": consumed, "seen": seen}
        )

# ------------------------------------------------------------------------------------------------------------ save
hf.save_model(
    args.out,
    dist.full_weights(model),
    model.config,
    tokenizer_files(args.model, tokenizer),
    write=world.rank == 0,
)
logger.say(f"the model is in {args.out}")
dist.finish()
