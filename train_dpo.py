"""DPO and its family: make the chosen answer likelier than the rejected one, relative to a
reference.

    c = log pi(y_chosen | x) - log ref(y_chosen | x), over its tokens; r: the same of y_rejected
    loss = - sum_p log sigmoid(beta (c_p - r_p)) / P     P: pairs of the step (2305.18290 eq. 7)

--loss takes one loss of the family, or several to sum; nanopost/preference.py has the formulas:
sigmoid, sigmoid_norm, ipo, hinge, robust, exo, discopop, nca, sppo, apo_zero, apo_down, and the
reference-free simpo, cpo, orpo and sft. train_kto.py has the losses that couple the pairs of a
step; train_online_dpo.py samples its pairs from the policy.

    python train_dpo.py --model out/sft --data pairs.jsonl
    torchrun --nproc_per_node 8 train_dpo.py --model out/sft --data pairs.jsonl --beta 0.05
"""

import math
import time
from functools import partial

import torch

from nanopost import InputError, cli, dist, hf, optim, packing, pairs, preference, reference, rows
from nanopost.cli import above, at_least, finite
from nanopost.forward import batches, check_finite, gather_pairs
from nanopost.plan import end_dry_run
from nanopost.report import marked_text
from nanopost.tape import Tape
from nanopost.terminal import progress
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: N packed tokens, P pairs, S sequences: number 2p is the chosen one of pair p, 2p + 1 the
# rejected one.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, out="out/dpo", lr=1e-6)
cli.add_pair_flags(parser)
cli.add_reference_flags(parser)
add = parser.add_argument
add("--loss", nargs="+", default=["sigmoid"], choices=preference.LOSSES, metavar="LOSS")
add("--loss_weights", type=finite, nargs="+", help="one per --loss; default: all 1")
add("--beta", type=above(0.0), default=0.1, help="scale of a log-ratio; ipo calls it tau")
add("--smoothing", type=at_least(0.0), default=0.0, help="assumed share of swapped pairs")
add("--gamma", type=finite, default=0.5, help="target margin of simpo")
add("--divergence", default="reverse_kl", choices=["reverse_kl", "forward_kl", "js", "alpha"])
add("--alpha", type=finite, default=0.5, help="alpha of --divergence alpha")
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
loss_functions = [preference.LOSSES[name] for name in args.loss]
loss_weights = args.loss_weights or [1.0] * len(args.loss)
f_score = {
    "reverse_kl": preference.reverse_kl,
    "forward_kl": preference.forward_kl,
    "js": preference.js,
    "alpha": partial(preference.alpha_divergence, alpha=args.alpha),
}[args.divergence]
cli.check_one_each("loss_weights", args.loss_weights, "loss", args.loss)
if args.smoothing and not preference.any_reads(loss_functions, "smoothing"):
    raise InputError(f"--loss {' '.join(args.loss)} does not use --smoothing.")
if args.divergence != "reverse_kl":
    for name, loss in zip(args.loss, loss_functions):
        if not preference.any_reads([loss], "_score_P"):
            raise InputError(f"--loss {name} does not use --divergence {args.divergence}.")


def loss_of(pairs_P, nll_tokens):
    """The weighted sum of the --loss terms of each pair -> loss_P. A loss is a function in
    preference.py; its parameter names say which columns of the pairs it gets."""
    return preference.weighted(
        loss_functions,
        loss_weights,
        pairs_P,
        beta=args.beta,
        smoothing=args.smoothing,
        gamma=args.gamma,
        nll_tokens=nll_tokens,
    )


loss_of(preference.no_pairs(), nll_tokens=1.0)  # fail now if a loss rejects a flag

tokenizer = Tokenizer.load(args.model, args.chat_template)
model = hf.load_model(args.model, world.device, shard=cli.shard(args, world))
reference_folder = args.reference_model or args.model
reference_model = None
if preference.needs_reference(loss_functions):
    tokenizer.check_same(reference_folder, "--reference_model ")
    reference_model = cli.reference(args, reference_folder, model, world)
elif args.reference_model or args.reference == "precomputed":
    raise InputError(f"--loss {' '.join(args.loss)} uses no reference.")

train_rows, eval_rows = rows.load(
    args.data, args.eval_data, args.holdout, args.rename, rows.pair, args.to_messages
)
eval_rows = eval_rows[: args.eval_rows]
max_length = min(args.max_length or args.tokens // 2, model.config.max_positions)


def encode(given):
    """Rows -> (pairs of examples with the columns a loss reads, counts of what was cut or
    dropped)."""
    encoded = [tokenizer.pair(row) for row in progress(given, "pairs encoded")]
    pairs_P, counts = pairs.fit_to(encoded, max_length, args.overlong)
    # ORPO's nll covers the prompt too: its tokens become targets, of weight 0 in the answer's logp
    pairs.add_columns(pairs_P, train_prompt="orpo" in args.loss)
    reference.add_no_reference(pairs_P)
    return pairs_P, counts


train_pairs, cut = encode(train_rows)
eval_pairs, eval_cut = encode(eval_rows)
# InputError now, and not in the middle of a run, if a pair does not fit into a micro-batch.
packing.pack([len(chosen) + len(rejected) for chosen, rejected in train_pairs], args.tokens)
if args.reference == "precomputed" and reference_model is not None:
    for pairs_P in (train_pairs, eval_pairs):
        reference.add_cached_reference(
            pairs_P, reference_model, reference_folder, args.tokens, world, args.cache
        )
    reference_model = None  # no longer needed: its log-probs are cached
per_epoch = len(train_pairs)
args.steps = args.steps or math.ceil(args.epochs * per_epoch / args.rows)

optimizer = optim.adamw(model, args.weight_decay)
show = ["loss", "rewards/accuracies", "rewards/margins", "rewards/ties", "grad_norm", "entropy"]
show += ["lr"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0}
state = run.start(model, optimizer, fresh, args.resume, args.overwrite, fingerprint(tokenizer))
run.say(check_stage(args.model, tokenizer))
run.say(tokenizer.doubts(train_rows))
if args.reference_model:
    run.say(check_stage(args.reference_model, tokenizer))
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


@torch.no_grad()
def evaluate():
    """Loss and metrics of held-out pairs."""
    if not eval_pairs:
        return {}
    mine = eval_pairs[world.rank :: world.size]
    if reference_model is not None:
        reference.add_reference(mine, reference_model, args.tokens, world.device)
    sequences, _ = gather_pairs(model, mine, args.tokens, world.device)
    pairs_P = preference.read_pairs(sequences, f_score)
    loss_P = loss_of(pairs_P, nll_tokens=float(sequences["targets"][0::2].mean()))
    sums = {"loss": loss_P.sum(), **preference.pair_metrics(pairs_P, args.beta, loss_functions)}
    return {f"eval/{name}": float(total) / len(loss_P) for name, total in sums.items()}


if args.dry_run:
    end_dry_run("dpo", vars(args), world, train_pairs)

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
tape = Tape(args.record)
standstill = optim.Standstill(0 if run.resumed else args.steps)
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- pairs
    began = time.perf_counter()
    indices, _ = packing.share(per_epoch, args.seed, state["consumed"], args.rows, world)
    state["consumed"] += args.rows
    step_pairs = [train_pairs[i] for i in indices]
    if reference_model is not None:
        reference.add_reference(step_pairs, reference_model, args.tokens, world.device)
    chosen_targets = sum(chosen.num_targets for chosen, _ in step_pairs)
    nll_tokens = dist.all_sum(chosen_targets) / args.rows  # scales nll to per token of the step

    # ---- update
    meter = dist.Meter()
    # Ranks run equally many micro-batches, padded with dummies: each pass is a collective.
    for batch in batches(model, step_pairs, args.tokens, world.device):
        logp_N, entropy_N = model(batch)
        sequences = {
            "logp": batch.sequences.sum(logp_N * batch["weight"]),
            "nll": batch.sequences.sum(-logp_N),
            "ref_logp": batch["ref_logp"],
            "length": batch["length"],
        }
        pairs_P = preference.read_pairs(sequences, f_score)
        loss = loss_of(pairs_P, nll_tokens).sum()  # a dummy gives no gradient
        # A mean over the pairs of the step.
        (loss / args.rows).backward()
        tape.add(batch, logp=logp_N, entropy=entropy_N, loss=loss)
        if not batch.dummy:  # its empty pair would be a tie
            metrics = preference.pair_metrics(pairs_P, args.beta, loss_functions)
            meter.add(batch.num_examples // 2, loss=loss, **metrics)
        meter.add(batch.num_targets, entropy=entropy_N.sum())
    examples = [e for pair in step_pairs for e in pair]
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
        about = {"divisor": args.rows, "nll_tokens": nll_tokens}
        run.record(step, examples, about, tape, row=indices)

    # ---- save
    if run.due_save(step, args.save_every, args.save_minutes):
        run.save(step, model, optimizer, state)

# --------------------------------------------------------------------------------------------- save
files = tokenizer_files(args.model, tokenizer)
run.export(dist.full_weights(model), model.config, files, args.save_dtype)
run.finish()
