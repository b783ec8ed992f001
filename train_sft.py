"""Supervised fine-tuning: raise the probability of the answers, token by token.

    loss = - sum_t log p(y_t | x, y_<t) / T     T: trained tokens of the step, over all ranks

--loss dft weighs each token by its own probability, held constant (2508.05629). Rows are rendered
and encoded once and packed without padding; no document attends to another. --train_on selects
which of their tokens are targets.

    python train_sft.py --model Qwen2.5-0.5B --data chats.jsonl --chat_template chatml.jinja
    torchrun --nproc_per_node 8 train_sft.py --model Qwen2.5-1.5B --data chats.jsonl --epochs 2
"""

import math
import time

import torch

from nanopost import cli, dist, hf, losses, optim, packing, rows
from nanopost.cli import above, at_least
from nanopost.forward import batches, check_finite
from nanopost.plan import end_dry_run
from nanopost.report import report
from nanopost.tape import Tape
from nanopost.terminal import progress
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: N packed tokens of a micro-batch.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, model=None, out="out/sft", lr=1e-5, weight_decay=0.01)
add = parser.add_argument
add("--epochs", type=above(0.0), default=1.0, help="passes over the data")
add("--steps", type=at_least(1), help="optimizer steps; overrides --epochs")
add("--rows", type=at_least(1), default=64, help="rows per optimizer step, over all ranks")
add(
    "--bins", type=at_least(0), default=0, help="bins of --tokens tokens per step; overrides --rows"
)
add("--loss", default="nll", choices=["nll", "dft"])
add(
    "--train_on",
    default="assistant",
    choices=["assistant", "last", "completion", "all"],
    help="which tokens are targets",
)
add(
    "--max_length",
    type=at_least(2),
    help="maximum tokens per row; default: --tokens or the model's limit, if lower",
)
add(
    "--overlong",
    default="truncate",
    choices=["truncate", "split", "drop"],
    help="what to do with longer rows",
)
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
tokenizer = Tokenizer.load(args.model, args.chat_template)
model = hf.load_model(args.model, world.device, shard=cli.shard(args, world))

train_rows, eval_rows = rows.load(
    args.data, args.eval_data, args.holdout, args.rename, rows.sft, args.to_messages
)
eval_rows = eval_rows[: args.eval_rows]
max_length = min(args.max_length or args.tokens, args.tokens, model.config.max_positions)
encoded = [tokenizer.example(row, args.train_on) for row in progress(train_rows, "rows encoded")]
train_examples, cut = packing.fit_to(encoded, max_length, args.overlong)
eval_encoded = [
    tokenizer.example(row, args.train_on) for row in progress(eval_rows, "held-out rows encoded")
]
eval_examples, eval_cut = packing.fit_to(eval_encoded, max_length, args.overlong)

lengths = [len(e) for e in train_examples]
if args.bins:
    per_step, unit = args.bins, "bins"
    per_epoch, rows_of_step = packing.by_bins(lengths, args.tokens, args.seed)
else:
    per_step, unit = args.rows, "rows"
    per_epoch, rows_of_step = packing.by_rows(len(lengths), args.seed)
args.steps = args.steps or math.ceil(args.epochs * per_epoch / per_step)

optimizer = optim.adamw(model, args.weight_decay)
show = ["loss", "grad_norm", "lr", "tokens_per_second"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0}
state = run.start(model, optimizer, fresh, args.resume, args.overwrite, fingerprint(tokenizer))
run.say(check_stage(args.model, tokenizer))
run.say(
    f"{rows.named(args.data)}, before anything is cut: {report(encoded, tokenizer, train_rows)}"
)
run.say(f"{len(train_examples):,} rows to train on, {len(eval_examples):,} held out")
run.say(f"cut or dropped: {packing.counted(cut)}; held out: {packing.counted(eval_cut)}")
epochs = args.steps * per_step / per_epoch
filled = packing.fill_rate(lengths, packing.pack(lengths, args.tokens), args.tokens)
run.say(
    f"each step takes {per_step} of the {per_epoch:,} {unit} of an epoch: {args.steps:,} steps, "
    f"{epochs:.3g} epochs; packed as a whole, {args.tokens}-token bins are {filled:.1%} full"
)


@torch.no_grad()
def evaluate():
    """Mean loss and entropy over the trained tokens of held-out rows."""
    meter = dist.Meter()
    for batch in batches(model, eval_examples[world.rank :: world.size], args.tokens, world.device):
        logp_N, entropy_N = model(batch)
        meter.add(
            batch.num_targets, **{"eval/loss": -logp_N.sum(), "eval/entropy": entropy_N.sum()}
        )
    return meter.means()


if args.dry_run:
    end_dry_run("sft", vars(args), world, lengths)

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
loss_of = {"nll": losses.sft_nll, "dft": losses.sft_dft}[args.loss]
tape = Tape(args.record)
standstill = optim.Standstill(0 if run.resumed else args.steps)
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- update
    began = time.perf_counter()
    indices = rows_of_step(state["consumed"], per_step)[world.rank :: world.size]
    state["consumed"] += per_step
    examples = [train_examples[i] for i in indices]
    targets, tokens = dist.all_sums(sum(e.num_targets for e in examples), sum(map(len, examples)))
    meter = dist.Meter()
    for batch in batches(model, examples, args.tokens, world.device):
        logp_N, entropy_N = model(batch)
        loss = loss_of(logp_N, batch.mask_N)
        (loss / targets).backward()
        tape.add(batch, logp=logp_N, entropy=entropy_N, loss=loss)
        meter.add(batch.num_targets, loss=loss, entropy=entropy_N.sum())
    grad_norm = dist.clip_grad_norm(model, args.grad_clip)
    check_finite(grad_norm, step, model, examples, tokenizer.decode)
    lr = optim.learning_rate(step, args.steps, args.lr, args.warmup)
    optim.set_learning_rate(optimizer, lr)
    tape.update(examples, grad_norm, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    # ---- log
    state["num_tokens"] += tokens
    metrics = {
        **meter.means(),
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
        run.record(step, examples, {"divisor": targets}, tape, row=indices)

    # ---- save
    if run.due_save(step, args.save_every, args.save_minutes):
        run.save(step, model, optimizer, state)

# --------------------------------------------------------------------------------------------- save
files = tokenizer_files(args.model, tokenizer)
run.export(dist.full_weights(model), model.config, files, args.save_dtype)
run.finish()
