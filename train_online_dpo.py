"""Online DPO (2402.04792): sample answers, and make the best of each group likelier than the worst.

    y_best, y_worst = the answers of highest and lowest reward among G samples of a prompt x
    c = log pi(y_best | x) - log ref(y_best | x); r likewise for the worst
    loss = - sum_p log sigmoid(beta (c_p - r_p)) / P     P: pairs of the step

--reward scores answers; --judge compares them in pairs, and an answer's wins are added to its
reward. Groups in which all rewards are equal give no pair. --loss selects another loss of
train_dpo.py.

    python train_online_dpo.py --model out/sft --data prompts.jsonl --reward model:out/rm
    torchrun --nproc_per_node 8 train_online_dpo.py --model out/sft --data prompts.jsonl \\
        --reward gsm8k
"""

import torch

from nanopost import (
    InputError,
    cli,
    dist,
    forward,
    hf,
    optim,
    packing,
    pairs,
    preference,
    reference,
    rewards,
    rows,
)
from nanopost.cli import above, at_least, finite
from nanopost.engine import prompt_seed
from nanopost.forward import batches, check_finite
from nanopost.plan import end_dry_run
from nanopost.rollout import length_metrics, sample_records, staleness_metrics
from nanopost.run import Clock
from nanopost.tape import Tape
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: N packed tokens, S sequences (2p is the best one of pair p, 2p + 1 the worst), P prompts
# or pairs, G samples per prompt, F reward functions.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, out="out/online_dpo", lr=1e-6, save_every=20)
cli.add_rollout_flags(parser)
add = parser.add_argument
add("--steps", type=at_least(1), default=120, help="optimizer steps")
add("--prompts", type=at_least(1), default=64, help="prompts per step, over all ranks")
add("--group", type=at_least(2), default=4, help="samples per prompt")
add("--judge", metavar="file.py:f", help="f(prompts, pairs of texts) -> 0, 1 or None for each pair")
add("--eos_penalty", type=at_least(0.0), default=1.0, help="penalty for an unfinished answer")
add("--loss", nargs="+", default=["sigmoid"], choices=preference.LOSSES, metavar="LOSS")
add("--loss_weights", type=finite, nargs="+", help="one per --loss; default: all 1")
add("--beta", type=above(0.0), default=0.1, help="scale of a log-ratio; ipo calls it tau")
add("--smoothing", type=at_least(0.0), default=0.0, help="assumed share of swapped pairs")
add("--gamma", type=finite, default=0.5, help="target margin of simpo")
add("--reference_model", help="folder of the reference; default: --model")
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
loss_functions = [preference.LOSSES[name] for name in args.loss]
loss_weights = args.loss_weights or [1.0] * len(args.loss)
cli.check_one_each("loss_weights", args.loss_weights, "loss", args.loss)
if args.smoothing and not preference.any_reads(loss_functions, "smoothing"):
    raise InputError(f"--loss {' '.join(args.loss)} does not use --smoothing.")
if args.reference_model and not preference.needs_reference(loss_functions):
    raise InputError(f"--loss {' '.join(args.loss)} does not use --reference_model.")
if args.reward_weights and not args.reward:
    raise InputError("--reward_weights needs --reward.")
if args.judge and ".py:" not in args.judge:
    raise InputError(f"--judge {args.judge}: give a function of your own as file.py:function.")
if not args.reward and not args.judge and not args.env:
    raise InputError("give --reward or --judge to rank the answers.")

tokenizer = Tokenizer.load(args.model, args.chat_template)
model = hf.load_model(args.model, world.device, shard=cli.shard(args, world))
reference_folder = args.reference_model or args.model
reference_model = None
if preference.needs_reference(loss_functions):
    tokenizer.check_same(reference_folder, "--reference_model ")
    reference_model = cli.reference(args, reference_folder, model, world)
engine = cli.engine(args, args.model, model, world, tokenizer)

train_rows, eval_rows = rows.load(
    args.data, args.eval_data, args.holdout, args.rename, rows.prompt, args.to_messages
)
eval_rows = eval_rows[: args.eval_rows]
play = cli.environment(args, tokenizer, model.config.max_positions, train_rows + eval_rows, sides=2)
(train_rows, eval_rows), report = tokenizer.with_prompts(
    (train_rows, eval_rows),
    args.max_prompt,
    args.max_new_tokens,
    args.tokens,
    model.config.max_positions,
    sides=2,
)
reward_functions, reward_weights = [], []
if args.reward:
    reward_functions, reward_weights = cli.load_rewards(args, tokenizer, world)
columns_report = rewards.check(reward_functions, train_rows + eval_rows)
judge = rewards.load_one(args.judge, timeout=args.reward_timeout) if args.judge else None
stateful = reward_functions + ([judge] if judge else [])
sampling = cli.sampling(args, kept=False)

optimizer = optim.adamw(model, args.weight_decay)
show = ["reward", "loss", "rewards/accuracies", "rewards/margins", "rewards/ties", "entropy"]
show += ["grad_norm", "lr"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0}
state = run.start(model, optimizer, fresh, args.resume, args.overwrite, fingerprint(tokenizer))
run.say(check_stage(args.model, tokenizer))
if args.reference_model:
    run.say(check_stage(args.reference_model, tokenizer))
epochs = args.steps * args.prompts / len(train_rows)
run.say(f"{args.steps:,} steps of {args.prompts} prompts: {epochs:.3g} epochs")
run.say(f"{len(train_rows):,} prompts, {len(eval_rows):,} held out; {report}; the first one:")
run.say(tokenizer.decode(train_rows[0]["prompt_ids"]))
run.say(columns_report)
run.say(rewards.restore(stateful, state))
engine = cli.ahead(args, engine, world, train_rows, sampling, state["step"])


def rollout(rows_P, serials, n, sampling):
    """n completions of each prompt and their rewards -> (rollouts [P][n], float64 reward_PG)."""
    if not rows_P:  # a rank may have fewer prompts than others
        return [], torch.zeros(0, n, dtype=torch.float64)
    seeds = [prompt_seed(args.seed, serial) for serial in serials]
    groups = play(engine, rows_P, n, sampling, seeds)
    reward_PG = torch.zeros(len(rows_P), n, dtype=torch.float64)
    if reward_functions:
        step = engine.version + 1
        reward_FPG = rewards.score(reward_functions, tokenizer, rows_P, groups, step)
        reward_PG += rewards.total(reward_FPG, reward_weights)
    if judge:  # it ranks what no reward applies to, too
        reward_PG = reward_PG.nan_to_num(0) + rewards.judged(judge, tokenizer, rows_P, groups)
    return groups, reward_PG


def evaluate():
    """Held-out prompts: mean reward, sampled and greedy, and KL(policy || reference) of the
    samples."""
    metrics = {}
    if not reward_functions:
        return metrics
    mine = packing.part(len(eval_rows), world)
    rows_P, serials = [eval_rows[i] for i in mine], [2**32 + i for i in mine]
    for name, temperature in [("accuracy", 1.0), ("greedy", 0.0)]:
        with rewards.held_out(stateful):
            groups, reward_PG = rollout(rows_P, serials, 1, sampling.held_out(temperature))
        applies_PG = ~reward_PG.isnan()
        metrics |= dist.means({f"eval/{name}": (reward_PG[applies_PG], applies_PG.sum())})
        if name == "accuracy" and reference_model is not None:
            examples = [r.example() for (r,) in groups]
            # Both log-probs from the trainer: in bf16 the engine's rounding would count as a KL.
            logps, ref_logps = [
                forward.logprobs(x, examples, args.tokens, 1.0, world.device)
                for x in (model, reference_model)
            ]
            kl_P = [float((x - ref_x).sum()) for x, ref_x in zip(logps, ref_logps)]
            metrics |= dist.means({"eval/kl": (torch.tensor(kl_P).double(), len(kl_P))})
    return metrics


if args.dry_run:
    end_dry_run("online_dpo", vars(args), world, [len(row["prompt_ids"]) for row in train_rows])

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
engine.sync_weights(dist.full_weights(model), state["step"])
tape = Tape(args.record)
standstill = optim.Standstill(0 if run.resumed else args.steps)
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- rollout
    clock = Clock()
    indices, serials = engine.share(state["consumed"], args.prompts)
    state["consumed"] += args.prompts
    groups, reward_PG = rollout([train_rows[i] for i in indices], serials, args.group, sampling)
    rollouts = [r for group in groups for r in group]
    unended = torch.tensor([r.finish == "length" for r in rollouts])
    reward_PG -= args.eos_penalty * unended.view_as(reward_PG)
    engine.sleep()  # if it shares the GPU, its memory is free until the sync
    clock.lap("rollout")

    # ---- pairs: the best and the worst of each group
    examples_PG = [[r.example() for r in group] for group in groups]
    step_pairs = pairs.best_and_worst(examples_PG, reward_PG)
    pairs.add_columns(step_pairs, train_prompt="orpo" in args.loss)
    reference.add_no_reference(step_pairs)
    if reference_model is not None:
        reference.add_reference(step_pairs, reference_model, args.tokens, world.device)
    chosen_targets = sum(best.num_targets for best, _ in step_pairs)
    num_pairs, targets = dist.all_sums(len(step_pairs), chosen_targets)
    nll_tokens = targets / max(1, num_pairs)

    # ---- update
    meter = dist.Meter()
    for batch in batches(model, step_pairs, args.tokens, world.device):
        logp_N, entropy_N = model(batch)
        sequences = {
            "logp": batch.sequences.sum(logp_N * batch["weight"]),
            "nll": batch.sequences.sum(-logp_N),
            "ref_logp": batch["ref_logp"],
            "length": batch["length"],
        }
        pairs_P = preference.read_pairs(sequences)
        loss_P = preference.weighted(
            loss_functions,
            loss_weights,
            pairs_P,
            beta=args.beta,
            smoothing=args.smoothing,
            gamma=args.gamma,
            nll_tokens=nll_tokens,
        )
        loss = loss_P.sum()  # a dummy gives no gradient
        # A mean over the pairs of the step.
        (loss / max(1, num_pairs)).backward()
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
    # Without a pair AdamW would still decay the weights and follow its momentum.
    if num_pairs:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clock.lap("train")

    # ---- sync
    engine.sync_weights(dist.full_weights(model), step)
    clock.lap("sync")

    # ---- log
    tokens = dist.all_sum(sum(map(len, examples)))
    state["num_tokens"] += tokens
    state["rewards"] = rewards.states(stateful)
    unrewarded_PG = reward_PG.isnan()
    meter.add((~unrewarded_PG).sum(), reward=reward_PG[~unrewarded_PG])
    meter.add(reward_PG.numel(), **{"completions/unrewarded": unrewarded_PG.sum()})
    meter.add(len(groups), ties=len(groups) - len(step_pairs))
    metrics = {
        **meter.means(),
        **length_metrics(groups),
        **staleness_metrics(rollouts, step - 1),
        "grad_norm": grad_norm,
        "lr": lr,
        "epoch": state["consumed"] / len(train_rows),
        "pairs": num_pairs,
        "num_tokens": state["num_tokens"],
        **clock.metrics(tokens),
    }
    if run.due(step, args.eval_every):
        metrics |= evaluate()
    run.log(step, metrics)
    run.say(standstill.hint(num_pairs == 0, optim.EQUAL_REWARDS))
    run.samples(
        step, sample_records(tokenizer.decode, rollouts[: args.group], reward=reward_PG.flatten())
    )
    if args.record:
        run.record(
            step,
            [e for group in examples_PG for e in group],
            {"divisor": num_pairs, "nll_tokens": nll_tokens},
            tape,
            serial=serials,
            reward=reward_PG.flatten().tolist(),
            finish=[r.finish for r in rollouts],
        )

    # ---- save
    if run.due_save(step, args.save_every, args.save_minutes):
        run.save(step, model, optimizer, state)

# --------------------------------------------------------------------------------------------- save
engine.close()
files = tokenizer_files(args.model, tokenizer)
run.export(dist.full_weights(model), model.config, files, args.save_dtype)
run.finish()
