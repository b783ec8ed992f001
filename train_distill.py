"""On-policy distillation: the student samples, and learns at each token what its teacher would say.

    loss = sum_i sum_t D(p(. | x_i, y_i,<t), q(. | x_i, y_i,<t)) / n        GKD, 2306.13649

p: the student, q: the teacher, a frozen model that reads the same tokens; n: tokens of the
optimizer step, over all ranks. With m = beta q + (1 - beta) p, --beta selects

    1       KL(p || q), the reverse KL: the student seeks a mode of the teacher
    0       KL(q || p), the forward KL: it covers all of them
    else    beta KL(q || m) + (1 - beta) KL(p || m), the generalised Jensen-Shannon divergence

Distributions are whole, or with --teacher_top_k the teacher's likeliest tokens and the rest as one
token. --temperature divides the logits of both, and samples. Where --on_policy is below 1, the
other prompts of a step have the completion of their row in place of a sample: with 0 this is
distillation on given text. No gradient goes through the sampling, as in the paper.

As a policy gradient, with log q - log p of the sampled token as its advantage, this is a patch of
train_grpo.py: forks/distill.diff.

    torchrun --nproc_per_node 8 train_distill.py --model out/sft --teacher DIR --data prompts.jsonl
"""

import numpy as np
import torch

from nanopost import InputError, cli, dist, hf, optim, packing, rewards, rows
from nanopost.cli import above, at_least
from nanopost.engine import prompt_seed
from nanopost.forward import batches, check_finite, per_token
from nanopost.plan import end_dry_run
from nanopost.rollout import (
    LogpGap,
    length_metrics,
    sample_records,
    staleness_metrics,
    unsampled,
)
from nanopost.run import Clock
from nanopost.tape import Tape
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: N packed tokens of a micro-batch, P prompts, G = 1 sample per prompt, F reward functions.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, out="out/distill", lr=1e-6, warmup=10, eval_every=50, save_every=20)
cli.add_rollout_flags(parser)
parser.set_defaults(group=1)
add = parser.add_argument
add(
    "--teacher",
    nargs="+",
    required=True,
    metavar="FOLDER",
    help="a model of any size with the same tokenizer, or addresses of vLLM servers that serve it",
)
add(
    "--teacher_top_k",
    type=at_least(0),
    default=0,
    help="its likeliest tokens, the rest as one; 0: all",
)
add(
    "--beta",
    type=at_least(0.0, most=1.0),
    default=1.0,
    help="1: reverse KL, 0: forward KL, between: generalised Jensen-Shannon divergence",
)
add(
    "--on_policy",
    type=at_least(0.0, most=1.0),
    default=1.0,
    help="share of prompts that the student answers; the others have the completion of their row",
)
add("--steps", type=at_least(1), default=100, help="rollout batches")
add("--prompts", type=at_least(1), default=64, help="prompts per rollout batch, over all ranks")
add("--minibatches", type=at_least(1), default=1, help="optimizer steps per rollout batch")
add(
    "--max_logp_gap",
    type=above(0.0),
    help="stop if engine and trainer log-probs differ more on average; default 1e-3, bf16 0.1",
)
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
cli.check_divides("prompts", args.prompts, ranks=world.size, minibatches=args.minibatches)
if args.on_policy < 1 and args.max_staleness:
    raise InputError("--on_policy below 1 needs --max_staleness 0: all prompts would run ahead.")
if 0 < args.on_policy < 1 and args.reproducible:
    raise InputError("--reproducible samples whole chunks of prompts: give --on_policy 0 or 1.")
if (args.top_k, args.top_p, args.min_p) != (0, 1.0, 0.0):
    raise InputError(
        "--top_k, --top_p and --min_p would cut what the teacher is compared with: leave them out."
    )
if args.reward_weights:
    raise InputError(
        "--reward_weights has no use here, where rewards are only watched: leave it out."
    )
tokenizer = Tokenizer.load(args.model, args.chat_template)
model = hf.load_model(args.model, world.device, shard=cli.shard(args, world))
teacher = cli.teacher(args, model, world, tokenizer)
engine = cli.engine(args, args.model, model, world, tokenizer)

train_rows, eval_rows = rows.load(
    args.data, args.eval_data, args.holdout, args.rename, rows.answered, args.to_messages
)
eval_rows = eval_rows[: args.eval_rows]
positions = min(model.config.max_positions, teacher.max_positions)
play = cli.environment(args, tokenizer, positions, train_rows + eval_rows, needs_reward=False)
(train_rows, eval_rows), report = tokenizer.with_prompts(
    (train_rows, eval_rows),
    args.max_prompt,
    args.max_new_tokens,
    args.tokens,
    positions,
)
stored, cut = [], 0
if args.on_policy < 1:
    for row in train_rows:
        if row.get("completion") is None:
            raise InputError(
                f"{rows.place(row)}: it has no completion, which --on_policy {args.on_policy:g} "
                "needs: add one to each row (--rename theirs=completion), or give --on_policy 1."
            )
        answer = tokenizer.example(rows.sft(row), "completion").ended()
        if not answer.num_targets:
            raise InputError(f"{rows.place(row)}: no message of its completion is an assistant's.")
        stored.append(unsampled(row["prompt_ids"], answer, args.max_new_tokens))
        cut += len(answer) - answer.prompt_length > args.max_new_tokens
reward_functions = []
if args.reward:  # they are watched on held-out prompts, and train nothing
    reward_functions, _ = cli.load_rewards(args, tokenizer, world)
columns_report = rewards.check(reward_functions, eval_rows)

optimizer = optim.adamw(model, args.weight_decay)
show = ["divergence", "entropy", "grad_norm", "completions/mean_length", "lr"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0}
state = run.start(model, optimizer, fresh, args.resume, args.overwrite, fingerprint(tokenizer))
run.say(check_stage(args.model, tokenizer))
epochs = args.steps * args.prompts / len(train_rows)
run.say(f"{args.steps:,} steps of {args.prompts} prompts: {epochs:.3g} epochs")
run.say(f"{len(train_rows):,} prompts, {len(eval_rows):,} held out; {report}; the first one:")
run.say(tokenizer.decode(train_rows[0]["prompt_ids"]))
run.say(columns_report)
if cut:
    run.say(f"{cut:,} completions of the rows are cut to --max_new_tokens {args.max_new_tokens}")

sampling = cli.sampling(args)
engine = cli.ahead(args, engine, world, train_rows, sampling, state["step"])


def sampled(serial):
    """Whether the student answers a prompt, whatever rank has it."""
    return np.random.default_rng((args.seed, serial)).random() < args.on_policy


def rollout(rows_P, serials, sampling):
    """A completion of each prompt -> rollouts [P][1]."""
    seeds = [prompt_seed(args.seed, serial) for serial in serials]
    return play(engine, rows_P, 1, sampling, seeds)


def evaluate():
    """On held-out prompts: the divergence per token of samples at temperature 1, and with --reward
    the mean rewards of these and of greedy completions; eval/accuracy and eval/greedy are those of
    the first --reward."""
    metrics = {}
    mine = packing.part(len(eval_rows), world)
    rows_P = [eval_rows[i] for i in mine]
    serials = [2**32 + i for i in mine]  # disjoint from training's, so that seeds differ
    for name, temperature in [("accuracy", 1.0), ("greedy", 0.0)]:
        groups = rollout(rows_P, serials, sampling.held_out(temperature))
        if name == "accuracy":
            examples = [r.example() for (r,) in groups]
            meter = dist.Meter()
            found = per_token(divergence, examples, args.tokens, world.device)
            for e, divergence_T in zip(examples, found):
                meter.add(e.num_targets, **{"eval/divergence": divergence_T.sum()})
            metrics |= meter.means()
        if not reward_functions:
            break
        with rewards.held_out(reward_functions):
            reward_FPG = rewards.score(
                reward_functions, tokenizer, rows_P, groups, engine.version + 1
            )
        others = [f"eval/{name}/{f.name}" for f in reward_functions[1:]]
        metrics |= dist.means(rewards.sums([f"eval/{name}", *others], reward_FPG))
    return metrics


def divergence(batch):
    return model(batch, head=teacher(batch, temperature=1.0))[2]


if args.dry_run:
    lengths = [len(row["prompt_ids"]) for row in train_rows]
    end_dry_run("distill", vars(args), world, lengths)

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
gap = LogpGap(args.max_logp_gap, world.dtype)
tape = Tape(args.record)
engine.sync_weights(dist.full_weights(model), state["step"])
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- rollout: the student's own completions, or those of the rows
    clock = Clock()
    indices, serials = engine.share(state["consumed"], args.prompts)
    state["consumed"] += args.prompts
    answered = [k for k, serial in enumerate(serials) if sampled(serial)]
    groups = rollout(
        [train_rows[indices[k]] for k in answered], [serials[k] for k in answered], sampling
    )
    rollouts = [r for (r,) in groups]
    engine.sleep()  # if it shares the GPU, its memory is free until the sync
    own = dict(zip(answered, rollouts))
    examples = []
    for k, i in enumerate(indices):
        examples.append(own[k].example() if k in own else stored[i])
    clock.lap("rollout")

    # ---- update: one optimizer step per minibatch
    meter, loss_parts, divisors = dist.Meter(), [], []
    all_serials = dist.gather(serials)
    minibatches = packing.minibatches(examples, 1, serials, all_serials, args.minibatches)
    for k, minibatch in enumerate(minibatches):
        divisor = max(1, dist.all_sum(sum(e.num_targets for e in minibatch)))
        divisors.append(divisor)
        # Ranks run equally many micro-batches, padded with dummies: each pass is a collective.
        for batch in batches(model, minibatch, args.tokens, world.device):
            logp_N, entropy_N, divergence_N = model(batch, head=teacher(batch, args.temperature))
            loss = divergence_N.sum()
            (loss / divisor).backward()
            tape.add(batch, logp=logp_N, entropy=entropy_N, divergence=divergence_N, loss=loss)
            loss_parts.append(loss.detach().double() / divisor)
            meter.add(batch.num_targets, divergence=divergence_N.sum(), entropy=entropy_N.sum())
            if k == 0:  # before the first update, engine and trainer are the same policy
                drawn_N = batch.mask_N & (batch["version"] >= 0)
                same_N = batch["version"] == step - 1  # unless the rollouts ran ahead
                gap.add(logp_N, batch["engine_logp"], drawn_N, same_N)
        grad_norm = dist.clip_grad_norm(model, args.grad_clip)
        check_finite(grad_norm, step, model, minibatch, tokenizer.decode)
        update = (step - 1) * args.minibatches + k + 1
        lr = optim.learning_rate(update, args.steps * args.minibatches, args.lr, args.warmup)
        optim.set_learning_rate(optimizer, lr)
        tape.update(minibatch, grad_norm, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.lap("train")

    # ---- sync
    engine.sync_weights(dist.full_weights(model), step)
    clock.lap("sync")

    # ---- log
    tokens = dist.all_sum(sum(e.num_targets for e in examples))
    state["num_tokens"] += tokens
    metrics = {
        **meter.means(),
        **length_metrics(groups),
        **staleness_metrics(rollouts, step - 1),
        **gap.metrics(),
        "loss": dist.all_sum(torch.stack(loss_parts)) / args.minibatches,
        "on_policy": dist.all_sum(len(rollouts)) / args.prompts,
        "grad_norm": grad_norm,
        "lr": lr,
        "epoch": state["consumed"] / len(train_rows),
        "num_tokens": state["num_tokens"],
        **clock.metrics(tokens),
    }
    if run.due(step, args.eval_every):
        metrics |= evaluate()
    run.log(step, metrics)
    run.samples(step, sample_records(tokenizer.decode, rollouts[:4]))
    if args.record:
        finish = [own[k].finish if k in own else "row" for k in range(len(indices))]
        run.record(step, examples, {"divisors": divisors}, tape, serial=serials, finish=finish)
    gap.check(step)

    # ---- save
    if run.due_save(step, args.save_every, args.save_minutes):
        run.save(step, model, optimizer, state)

# --------------------------------------------------------------------------------------------- save
engine.close()
files = tokenizer_files(args.model, tokenizer)
run.export(dist.full_weights(model), model.config, files, args.save_dtype)
run.finish()
