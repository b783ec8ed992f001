"""Supervised fine-tuning: raise the probability of the answers, token by token.

    loss = - sum_t log p(y_t | x, y_<t) / T          T: trained tokens of the whole optimizer step, over all ranks

--loss dft weighs each token by its own probability, held constant (2508.05629). Rows are rendered and encoded once,
packed without padding, and no document sees another; --train_on says which of their tokens are targets.

    python train_sft.py                                              # the toy: 0.8 M parameters, two-digit sums
    torchrun --nproc_per_node 8 train_sft.py --model Qwen2.5-1.5B --data chats.jsonl --chat_template chatml.jinja
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch

from nanopost import checkpoint, dist, hf, losses, optim, packing, toy
from nanopost.batch import batch_of
from nanopost.cli import Help, check_numbers, refuse
from nanopost.rows import check_sft_row
from nanopost.rows import load as load_rows
from nanopost.run import Logger
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, report, tokenizer_files

# N packed tokens of a micro-batch.
# ------------------------------------------------------------------------------------------------------- arguments
parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
add = parser.add_argument
add("--model", default="toy", help="folder of a Hugging Face checkpoint, or toy: a fresh tiny one")
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
    help="columns, such as question=prompt answer=completion",
)
add("--out", default="out/sft", help="folder of the run; the trained model is written here")
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
add("--lr", type=float, help="peak learning rate; default 1e-5, for the toy 3e-3")
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
add("--steps", type=int, default=700, help="optimizer steps")
add("--epochs", type=float, help="instead of --steps: times over the rows")
add("--rows", type=int, default=64, help="rows of an optimizer step, over all ranks")
add(
    "--bins",
    type=int,
    default=0,
    help="instead of --rows: bins of --tokens tokens, packed over the whole epoch",
)
add("--loss", default="nll", choices=["nll", "dft"])
add(
    "--train_on",
    default="assistant",
    choices=["assistant", "last", "completion", "all"],
    help="what is a target",
)
add(
    "--max_length",
    type=int,
    help="longest row in tokens; default: --tokens, or what the model takes",
)
add(
    "--overlong",
    default="truncate",
    choices=["truncate", "split", "drop"],
    help="what becomes of longer rows",
)
args = parser.parse_args()
args.lr = args.lr if args.lr is not None else 3e-3 if args.data == "toy" else 1e-5

# ------------------------------------------------------------------------------------------------------- processes
world = dist.init(args.device)
check_numbers(vars(args))
torch.manual_seed(args.seed)
bf16 = args.dtype == "bf16" or (args.dtype == "auto" and world.device.type == "cuda")

# --------------------------------------------------------------------------------------------- tokenizer and model
refuse(
    (
        args.model == "toy" != args.data,
        "--model is missing: the toy's own model is for the toy's own data.",
    )
)
if args.model == "toy":
    args.model = f"{args.out}/toy"
    if world.rank == 0:
        toy.make(args.model)
    torch.distributed.barrier()
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
model = hf.load_model(args.model, world.device, shard=shard)

# ------------------------------------------------------------------------------------------------------------ data
if args.data == "toy":
    toy.check(tokenizer, args.model)
    rows, eval_rows = toy.sft_rows(), toy.sft_rows(held_out=True, noise=0.0, copies=1)
else:
    rows, eval_rows = load_rows(args.data, args.eval_data, args.holdout, args.rename)


def encode(rows):
    for row in rows:
        check_sft_row(row)
    examples = [tokenizer.example(row, args.train_on) for row in rows]
    text = report(examples, tokenizer, rows) if rows else ""
    longest = (
        min(args.tokens, model.config.max_positions) if args.max_length is None else args.max_length
    )
    return *packing.overlong(examples, longest, args.overlong), text


examples, cut, text = encode(rows)
eval_examples, eval_cut, _ = encode(eval_rows)
lengths = [len(e) for e in examples]
per_step, unit = (args.bins, "bins") if args.bins else (args.rows, "rows")
per_epoch, micro_batches_of_step = (packing.by_bins if args.bins else packing.by_rows)(
    lengths, args.tokens, args.seed
)
args.steps = math.ceil(args.epochs * per_epoch / per_step) if args.epochs else args.steps

# ------------------------------------------------------------------------------------------------------- optimizer
optimizer = optim.adamw(model, args.weight_decay, args.betas)
found = checkpoint.to_resume(args) if args.resume else None
state = checkpoint.load(found, model, optimizer) if found else {"step": 0, "consumed": 0, "seen": 0}
logger = Logger(
    args.out, world.rank, args.steps, ["loss", "grad_norm", "lr", "tokens_per_second"], args.verbose
)
replace = (
    args.overwrite or args.resume and not Path(args.out, "config.json").exists()
)  # killed before a checkpoint
logger.open(
    state["step"] if found else None, replace, {"args": vars(args), **fingerprint(tokenizer)}
)
for change in checkpoint.changed_arguments(state.get("args", vars(args)), vars(args)):
    logger.say(f"resumed with another {change}")
logger.say(stage)
logger.say(f"{args.data}, before anything is cut: {text}")
logger.say(f"cut or left out: {packing.counted(cut)}; held out: {packing.counted(eval_cut)}")
logger.say(
    f"a step is {per_step} of the {per_epoch:,} {unit} of an epoch; packed as a whole, {args.tokens}-token bins "
    f"would be filled to {packing.fill_rate(lengths, packing.pack(lengths, args.tokens), args.tokens):.1%}"
)


@torch.no_grad()
def evaluate():
    """Mean loss and entropy of a trained token of the held-out rows."""
    if not eval_examples:
        return {}
    mine, loss, entropy = eval_examples[world.rank :: world.size], 0.0, 0.0
    for part in dist.even(packing.micro_batches([len(e) for e in mine], args.tokens)):
        logp_N, entropy_N = model(batch_of([mine[i] for i in part], world.device))
        loss -= float(logp_N.sum())
        entropy += float(entropy_N.sum())
    tokens = sum(e.num_targets for e in mine)
    return dist.means({"eval/loss": (loss, tokens), "eval/entropy": (entropy, tokens)})


# ------------------------------------------------------------------------------------------------------------ loop
loss_function = {"nll": losses.sft_nll, "dft": losses.sft_dft}[args.loss]
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
    batches = [batch_of([examples[i] for i in part], world.device) for part in micro_batches]
    trained, tokens = dist.all_sum(
        sum(int(b.mask_N.sum()) for b in batches),
        sum(lengths[i] for part in micro_batches for i in part),
    )
    loss_sum = entropy_sum = 0.0
    for batch in batches:
        logp_N, entropy_N = model(batch)
        loss, _ = loss_function(logp_N, batch.mask_N)
        (
            loss * world.size / trained
        ).backward()  # FSDP averages gradients over ranks: world.size undoes it
        loss_sum += float(loss.detach())
        entropy_sum += float(entropy_N.detach().sum())
    grad_norm = dist.clip_grad_norm(model, args.grad_clip)
    lr = optim.learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
    optim.set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    # ---- log
    seen += tokens
    share = trained / world.size
    metrics = {
        **dist.means({"loss": (loss_sum, share), "entropy": (entropy_sum, share)}),
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
