"""KTO, BCO and AOT: preference losses that couple each example to all others of the step.

    kto           rows with a label, good or bad, measured against the KL of the step   2402.01306
    bco           pairs, on either side of the running mean of all rewards              2404.04656
    aot           pairs: the sorted margins of the policy above those of the reference  2406.05882
    aot_unpaired  pairs: sorted log-ratios of chosen answers above those of rejected ones

Such a loss L is not a sum over micro-batches: it is a function of the log-probs l_s of all
sequences s of the step, on all ranks, which may not fit in memory at once. Two passes compute its
exact gradient:

    1  all l_s without gradients, then L and its slopes g_s = dL / dl_s
    2  in micro-batches of any size, the gradient of sum_s g_s l_s, with each g_s held constant

because dL/dw = sum_s (dL/dl_s) (dl_s/dw). With --sft_weight, the nll of each sequence has a slope
too. Nothing is approximated, and nothing depends on --tokens or on the number of ranks.

    python train_kto.py --model out/sft --data labelled.jsonl   # {"prompt", "completion", "label"}
    torchrun --nproc_per_node 8 train_kto.py --model out/sft --data pairs.jsonl --loss aot
"""

import math
import time

import torch

from nanopost import InputError, cli, dist, hf, optim, packing, pairs, preference, reference, rows
from nanopost.batch import Example
from nanopost.cli import above, at_least
from nanopost.forward import batches, check_finite, gather_pairs
from nanopost.plan import end_dry_run
from nanopost.report import marked_text
from nanopost.tape import Tape
from nanopost.terminal import progress
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: N packed tokens, P pairs, S sequences: number 2p is the chosen one of pair p, 2p + 1 the
# rejected one. In KTO, chosen is a row's own completion, and rejected is another row's completion
# after the same prompt.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, out="out/kto", lr=1e-6)
cli.add_pair_flags(parser)
cli.add_reference_flags(parser)
add = parser.add_argument
add("--loss", default="kto", choices=preference.COUPLED)
add("--beta", type=above(0.0), default=0.1, help="scale of a log-ratio")
add("--smoothing", type=at_least(0.0), default=0.0, help="aot: assumed share of swapped pairs")
add(
    "--label_weights",
    type=at_least(0.0),
    nargs=2,
    default=[1.0, 1.0],
    help="kto: weights of good and bad rows",
)
add(
    "--sft_weight",
    type=at_least(0.0),
    default=0.0,
    help="weight of an extra SFT loss on chosen answers",
)
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
tokenizer = Tokenizer.load(args.model, args.chat_template)
model = hf.load_model(args.model, world.device, shard=cli.shard(args, world))
reference_folder = args.reference_model or args.model
tokenizer.check_same(reference_folder, "--reference_model ")
reference_model = cli.reference(args, reference_folder, model, world)

loss_functions, loss_weights = [preference.COUPLED[args.loss]], [1.0]
if args.sft_weight:
    loss_functions.append(preference.sft)
    loss_weights.append(args.sft_weight)
is_kto = args.loss == "kto"
if args.smoothing and not preference.any_reads(loss_functions, "smoothing"):
    raise InputError(f"--loss {args.loss} does not use --smoothing.")
if args.sft_weight and is_kto:
    raise InputError("--loss kto does not use --sft_weight: its rows may be bad answers.")
if args.label_weights != [1.0, 1.0] and not is_kto:
    raise InputError(f"--loss {args.loss} does not use --label_weights.")
form = rows.unpaired if is_kto else rows.pair
train_rows, eval_rows = rows.load(
    args.data, args.eval_data, args.holdout, args.rename, form, args.to_messages
)
eval_rows = eval_rows[: args.eval_rows]
max_length = min(args.max_length or args.tokens // 2, args.tokens, model.config.max_positions)


def encode(given):
    """Rows -> (pairs of examples with the columns a loss reads, counts of what was cut or
    dropped)."""
    if is_kto:
        labelled = rows.take_pairs_apart(given)
        examples = [
            tokenizer.example(row, "completion") for row in progress(labelled, "rows encoded")
        ]
        for e, row in zip(examples, labelled):
            e.columns["label"] = float(row["label"])
        examples, counts = packing.fit_to(examples, max_length, args.overlong)
        pairs_P = pairs.mismatched(examples, max_length)
    else:
        encoded = [tokenizer.pair(row) for row in progress(given, "pairs encoded")]
        pairs_P, counts = pairs.fit_to(encoded, max_length, args.overlong)
    pairs.add_columns(pairs_P)
    return pairs_P, counts


train_pairs, cut = encode(train_rows)
eval_pairs, eval_cut = encode(eval_rows)
if args.reference == "precomputed":
    for pairs_P in (train_pairs, eval_pairs):
        reference.add_cached_reference(
            pairs_P, reference_model, reference_folder, args.tokens, world, args.cache
        )
    reference_model = None  # no longer needed: its log-probs are cached
per_epoch = len(train_pairs)
args.steps = args.steps or math.ceil(args.epochs * per_epoch / args.rows)

optimizer = optim.adamw(model, args.weight_decay)
show = ["loss", "rewards/accuracies", "rewards/chosen", "rewards/ties", "grad_norm", "entropy"]
show += ["lr"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0, "reward_sum": 0.0, "reward_count": 0}
state = run.start(model, optimizer, fresh, args.resume, args.overwrite, fingerprint(tokenizer))
run.say(check_stage(args.model, tokenizer))
run.say(tokenizer.doubts(train_rows))
if args.reference_model:
    run.say(check_stage(args.reference_model, tokenizer))
first = "the first, then its prompt with another's answer, for the KL" if is_kto else "the first"
run.say(
    f"{len(train_pairs):,} examples, {len(eval_pairs):,} held out; {first}, answers in » and «:"
)
run.say("\n".join(marked_text(e, tokenizer) for e in train_pairs[0]))
run.say(f"cut or dropped: {packing.counted(cut)}; held out: {packing.counted(eval_cut)}")
epochs = args.steps * args.rows / per_epoch
run.say(
    f"each step takes {args.rows} of the {per_epoch:,} examples of an epoch: {args.steps:,} steps, "
    f"{epochs:.3g} epochs"
)


def coupled_loss(sequences):
    """The loss of each example, from the sequences of the whole step -> (loss_P, pairs)."""
    pairs_P = preference.read_pairs(sequences)
    loss_P = preference.weighted(
        loss_functions,
        loss_weights,
        pairs_P,
        beta=args.beta,
        smoothing=args.smoothing,
        label_P=sequences["label"][0::2],
        label_weights=args.label_weights,
        shift=state["reward_sum"] / max(1, state["reward_count"]),
        nll_tokens=float(sequences["targets"][0::2].mean()),
    )
    return loss_P, pairs_P


def whole_step_metrics(sequences, loss_P, pairs_P):
    """Means over examples that every rank holds, so nothing is reduced."""
    if is_kto:
        sums = preference.label_metrics(pairs_P, sequences["label"][0::2], args.beta)
    else:
        pair_sums = preference.pair_metrics(pairs_P, args.beta)
        sums = {name: (total, len(loss_P)) for name, total in pair_sums.items()}
    sums["loss"] = loss_P.sum(), len(loss_P)
    return {name: total.item() / int(count) for name, (total, count) in sums.items() if count}


@torch.no_grad()
def evaluate():
    """Loss and metrics of held-out examples."""
    if not eval_pairs:
        return {}
    mine = eval_pairs[world.rank :: world.size]
    if reference_model is not None:
        reference.add_reference(mine, reference_model, args.tokens, world.device)
    sequences, _ = gather_pairs(model, mine, args.tokens, world.device)
    metrics = whole_step_metrics(sequences, *coupled_loss(sequences))
    return {f"eval/{name}": value for name, value in metrics.items()}


if args.dry_run:
    end_dry_run("kto", vars(args), world, train_pairs)

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
tape = Tape(args.record)
standstill = optim.Standstill(0 if run.resumed else args.steps)
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- examples
    began = time.perf_counter()
    indices, _ = packing.share(per_epoch, args.seed, state["consumed"], args.rows, world)
    state["consumed"] += args.rows
    step_pairs = [train_pairs[i] for i in indices]
    if reference_model is not None:
        reference.add_reference(step_pairs, reference_model, args.tokens, world.device)

    # ---- first pass: the loss of the whole step, and its slope with respect to each log-prob
    sequences, mine_S = gather_pairs(model, step_pairs, args.tokens, world.device)
    ratio_S = sequences["logp"] - sequences["ref_logp"]
    state["reward_sum"] += float(args.beta * ratio_S.sum())
    state["reward_count"] += len(ratio_S)
    leaves = [sequences["logp"].requires_grad_(), sequences["nll"].requires_grad_()]
    loss_P, pairs_P = coupled_loss(sequences)
    slope_S, nll_slope_S = torch.autograd.grad(loss_P.sum(), leaves, materialize_grads=True)
    slopes = zip(slope_S[mine_S].tolist(), nll_slope_S[mine_S].tolist())

    # ---- second pass: sum_s slope_s logp_s, in micro-batches; sequences with slope 0 are skipped
    examples = []
    for e, (slope, nll_slope) in zip((e for pair in step_pairs for e in pair), slopes):
        if slope or nll_slope:
            columns = {**e.columns, "slope": slope, "nll_slope": nll_slope}
            examples.append(Example(e.ids, e.mask, columns))
    meter = dist.Meter()
    for batch in batches(model, examples, args.tokens, world.device):
        logp_N, entropy_N = model(batch)
        logp_S = batch.sequences.sum(logp_N * batch["weight"])
        nll_S = batch.sequences.sum(-logp_N)
        loss = (batch["slope"] * logp_S + batch["nll_slope"] * nll_S).sum()
        # A mean over the examples of the step.
        (loss / args.rows).backward()
        tape.add(batch, logp=logp_N, entropy=entropy_N)
        meter.add(batch.num_targets, entropy=entropy_N.sum())
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
        **whole_step_metrics(sequences, loss_P.detach(), pairs_P),
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
        every = [e for pair in step_pairs for e in pair]
        slopes = {"slope": slope_S[mine_S].tolist(), "nll_slope": nll_slope_S[mine_S].tolist()}
        run.record(step, every, {"divisor": args.rows}, tape, row=indices, **slopes)

    # ---- save
    if run.due_save(step, args.save_every, args.save_minutes):
        run.save(step, model, optimizer, state)

# --------------------------------------------------------------------------------------------- save
files = tokenizer_files(args.model, tokenizer)
run.export(dist.full_weights(model), model.config, files, args.save_dtype)
run.finish()
