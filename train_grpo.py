"""GRPO: sample a group of answers per prompt, reward them, and make the better ones likelier.

    A_i  = (R_i - mean(R)) / (std(R) + 1e-4)                over the group, 2402.03300 eq. 3
    r_t  = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss = - sum_i sum_t w_it min(r_t A_i, clip(r_t, 1 - low, 1 + high) A_i) / D
           + beta sum_i sum_t w_it KL_it / D

--adv: group as above; mean without the std; loo minus the mean of the others; batch with the std of
the batch. --agg sets the weight w and the divisor D, which counts the whole optimizer step, over
all ranks:

    token         w = 1        D = trained tokens
    sequence      w = 1/|y_i|  D = sequences
    constant      w = 1        D = sequences x max_new_tokens
    sequence_sum  w = 1        D = sequences

Related methods, as flags:

    GRPO      2402.03300    --agg sequence --beta 0.04
    Dr. GRPO  2503.20783    --adv mean --agg constant
    DAPO      2503.14476    --clip 0.2 0.28 --resample 4
    RLOO      2402.14740    --adv loo --ratio sequence_sum --agg sequence
    GSPO      2507.18071    --ratio sequence --agg sequence --clip 3e-4 4e-4
    LUSPO     2602.05261    --ratio sequence --agg sequence_sum --clip 3e-4 4e-4
    CISPO     2506.13585    --loss cispo
    SAPO      2511.20347    --loss sapo --agg sequence
    DPPO      2602.04879    --loss dppo --clip 0.15 0.15

Unlike the GRPO paper: no KL by default, token-level averaging, old log-probs from the engine. More
variants are in forks/: two-sided clip, overlong masking, top-entropy tokens, GDPO, KL in the
reward.

    bash runs/toy.sh                                      # on a laptop, two to four minutes
    torchrun --nproc_per_node 8 train_grpo.py --model out/sft --data prompts.jsonl --reward gsm8k
"""

from functools import partial

import torch

from nanopost import InputError, advantages, cli, dist, hf, losses, optim, packing, rewards, rows
from nanopost.cli import above, at_least
from nanopost.engine import prompt_seed
from nanopost.forward import add_logprobs, batches, check_finite
from nanopost.plan import end_dry_run
from nanopost.rollout import LogpGap, length_metrics, sample_records, staleness_metrics
from nanopost.run import Clock
from nanopost.tape import Tape
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: N packed tokens of a micro-batch, P prompts, G samples per prompt, F reward functions.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, out="out/grpo", lr=1e-6, warmup=10, eval_every=50, save_every=20)
cli.add_rollout_flags(parser)
add = parser.add_argument
add("--steps", type=at_least(1), default=100, help="rollout batches")
add("--prompts", type=at_least(1), default=64, help="prompts per rollout batch, over all ranks")
add("--group", type=at_least(2), default=8, help="samples per prompt")
add("--minibatches", type=at_least(1), default=2, help="optimizer steps per rollout batch")
add(
    "--resample",
    type=at_least(0),
    default=0,
    help="extra rounds to replace groups with equal rewards",
)
add("--adv", default="group", choices=["group", "mean", "loo", "batch"], help="advantage")
add(
    "--ratio",
    default="token",
    choices=["token", "sequence", "sequence_sum"],
    help="level of the ratio pi / pi_old",
)
add("--loss", default="clip", choices=["clip", "cispo", "sapo", "dppo"])
add(
    "--clip",
    type=at_least(0.0),
    nargs=2,
    default=[0.2, 0.2],
    metavar=("LOW", "HIGH"),
    help="trust region: of the ratio around 1, under dppo of the probability",
)
add("--cispo_cap", type=at_least(1.0), default=5.0, help="largest ratio under cispo")
add("--sapo_tau", type=above(0.0), nargs=2, default=[1.0, 1.05], metavar=("POSITIVE", "OTHER"))
add(
    "--agg",
    default="token",
    choices=["sequence", "token", "constant", "sequence_sum"],
    help="how token losses are averaged",
)
add("--beta", type=at_least(0.0), default=0.0, help="KL coefficient; 0: no reference model")
add("--kl", default="k3", choices=["k1", "k2", "k3"], help="estimator of the KL")
add(
    "--old_logp", default="engine", choices=["engine", "trainer"], help="whose log-probs are pi_old"
)
add(
    "--correct",
    default="none",
    choices=["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"],
    help="importance weights trainer / engine; needs --old_logp trainer",
)
add("--correct_cap", type=at_least(0.0), default=3.0, help="maximum importance weight")
add(
    "--max_logp_gap",
    type=above(0.0),
    help="stop if engine and trainer log-probs differ more on average; default 1e-3, bf16 0.1",
)
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
if args.beta and args.kl == "k1":
    raise InputError(
        "--kl k1 has no expected gradient in a loss: use --kl k3 or k2, or forks/kl_reward.diff, "
        "which puts the KL into the reward."
    )
cli.check_divides("prompts", args.prompts, ranks=world.size, minibatches=args.minibatches)
tokenizer = Tokenizer.load(args.model, args.chat_template)
model = hf.load_model(args.model, world.device, shard=cli.shard(args, world))
reference = None
if args.beta:
    reference = cli.reference(args, args.model, model, world)
engine = cli.engine(args, args.model, model, world, tokenizer)

train_rows, eval_rows = rows.load(
    args.data, args.eval_data, args.holdout, args.rename, rows.prompt, args.to_messages
)
eval_rows = eval_rows[: args.eval_rows]
play = cli.environment(args, tokenizer, model.config.max_positions, train_rows + eval_rows)
(train_rows, eval_rows), report = tokenizer.with_prompts(
    (train_rows, eval_rows),
    args.max_prompt,
    args.max_new_tokens,
    args.tokens,
    model.config.max_positions,
)
reward_functions, reward_weights = cli.load_rewards(args, tokenizer, world)
columns_report = rewards.check(reward_functions, train_rows + eval_rows)

optimizer = optim.adamw(model, args.weight_decay)
show = ["reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "grad_norm", "loss"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0}
state = run.start(model, optimizer, fresh, args.resume, args.overwrite, fingerprint(tokenizer))
run.say(check_stage(args.model, tokenizer))
epochs = args.steps * args.prompts / len(train_rows)
run.say(f"{args.steps:,} steps of {args.prompts} prompts: {epochs:.3g} epochs")
run.say(f"{len(train_rows):,} prompts, {len(eval_rows):,} held out; {report}; the first one:")
run.say(tokenizer.decode(train_rows[0]["prompt_ids"]))
run.say(columns_report)
run.say(rewards.restore(reward_functions, state))

sampling = cli.sampling(args)
engine = cli.ahead(args, engine, world, train_rows, sampling, state["step"])
advantage = {
    "group": advantages.group,
    "mean": advantages.mean,
    "loo": advantages.leave_one_out,
    "batch": advantages.batch,
}[args.adv]
policy_loss = {
    "clip": partial(losses.policy_loss_clip, low=args.clip[0], high=args.clip[1]),
    "cispo": partial(losses.policy_loss_cispo, cap=args.cispo_cap),
    "sapo": partial(losses.policy_loss_sapo, tau=args.sapo_tau),
    "dppo": partial(losses.policy_loss_dppo, low=args.clip[0], high=args.clip[1]),
}[args.loss]
kl_estimate = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}[args.kl]
correction = losses.no_correction
if args.loss == "clip" and args.ratio == "sequence" and min(args.clip) > 0.02:
    run.say(
        f"warning: --clip {args.clip[0]:g} {args.clip[1]:g} never clips at --ratio sequence, a "
        "mean over tokens that hardly leaves 1: GSPO has --clip 3e-4 4e-4."
    )
if args.loss == "dppo" and args.ratio != "token":
    raise InputError(f"--loss dppo is about tokens: give --ratio token, not {args.ratio}.")
if args.correct != "none":
    if args.old_logp != "trainer":
        raise InputError("--correct needs --old_logp trainer.")
    level, mode = args.correct.split("-")
    correction = partial(losses.importance_weight, level=level, mode=mode, cap=args.correct_cap)


def rollout(rows_P, serials, n, sampling):
    """n completions per prompt -> (rollouts [P][n], float64 reward_FPG, NaN where not rewarded)."""
    seeds = [prompt_seed(args.seed, serial) for serial in serials]
    groups = play(engine, rows_P, n, sampling, seeds)
    step = engine.version + 1
    return groups, rewards.score(reward_functions, tokenizer, rows_P, groups, step)


def rollout_batch(consumed):
    """One group per prompt, of --prompts prompts after the first `consumed`, over all ranks.

    With --resample, groups whose rewards are all equal are dropped and as many new ones drawn in
    their place, for up to that many rounds (dynamic sampling, 2503.14476); there are too few if
    rounds run out. Which groups these are does not depend on the number of ranks. A rank may end
    empty.
    -> (groups, reward_FPG, the groups' serials, prompts drawn over all ranks, this rank's groups of
    equal rewards)
    """
    groups, rewards_FPG, kept, drawn, equal = [], [], [], 0, 0
    missing = args.prompts
    for _ in range(args.resample + 1):
        indices, serials = engine.share(consumed + drawn, missing)
        drawn += missing
        rows_P = [train_rows[i] for i in indices]
        new_groups, reward_FPG = rollout(rows_P, serials, args.group, sampling)
        # A rank may have got no prompts.
        reward_FPG = reward_FPG.view(len(reward_functions), len(rows_P), args.group)
        varied_P = advantages.std(rewards.total(reward_FPG, reward_weights)) > 1e-8
        equal += int((~varied_P).sum())
        keep_P = varied_P | (args.resample == 0)
        groups += [group for group, keep in zip(new_groups, keep_P) if keep]
        kept += [serial for serial, keep in zip(serials, keep_P) if keep]
        rewards_FPG.append(reward_FPG[:, keep_P])
        missing = args.prompts - int(dist.all_sum(len(groups)))
        if not missing:
            break
    return groups, torch.cat(rewards_FPG, 1), kept, drawn, equal


def evaluate():
    """Mean rewards on held-out prompts, one completion each: sampled at temperature 1, and greedy.
    eval/accuracy and eval/greedy are those of the first --reward."""
    metrics = {}
    mine = packing.part(len(eval_rows), world)
    rows_P = [eval_rows[i] for i in mine]
    serials = [2**32 + i for i in mine]  # disjoint from training's, so that seeds differ
    for name, temperature in [("accuracy", 1.0), ("greedy", 0.0)]:
        with rewards.held_out(reward_functions):
            _, reward_FPG = rollout(rows_P, serials, 1, sampling.held_out(temperature))
        others = [f"eval/{name}/{f.name}" for f in reward_functions[1:]]
        metrics |= dist.means(rewards.sums([f"eval/{name}", *others], reward_FPG))
    return metrics


if args.dry_run:
    lengths = [len(row["prompt_ids"]) for row in train_rows]
    end_dry_run("grpo", vars(args), world, lengths)

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
gap = LogpGap(args.max_logp_gap, world.dtype)
tape = Tape(args.record)
standstill = optim.Standstill(0 if run.resumed else args.steps)
engine.sync_weights(dist.full_weights(model), state["step"])
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- rollout
    clock = Clock()
    groups, reward_FPG, serials, drawn, equal = rollout_batch(state["consumed"])
    all_serials = dist.gather(serials)
    if not all_serials:
        if step > 1:
            run.save(step - 1, model, optimizer, state)
        raise InputError(
            f"step {step}: in {args.resample + 1} rounds of {args.prompts} prompts every group of "
            f"{args.group} had equal rewards: warm up with train_sft.py, change --data or "
            "--reward, or raise --group."
        )
    state["consumed"] += drawn
    rollouts = [r for group in groups for r in group]
    engine.sleep()  # if it shares the GPU, its memory is free until the sync
    clock.lap("rollout")

    # ---- log-probs of the sampled tokens, under the old policy and the reference
    examples = [r.example() for r in rollouts]
    if args.old_logp == "trainer":
        add_logprobs(examples, "old_logp", model, args.tokens, args.temperature, world.device)
    else:
        for e in examples:
            e.columns["old_logp"] = e.columns["engine_logp"]
    if reference is not None:
        add_logprobs(examples, "ref_logp", reference, args.tokens, args.temperature, world.device)

    # ---- advantage: how much better is a sample than the rest of its group?
    reward_PG = rewards.total(reward_FPG, reward_weights)
    adv_PG = advantage(reward_PG)
    for e, adv in zip(examples, adv_PG.flatten().tolist()):
        e.columns["adv"] = adv * e.mask

    # ---- update: one optimizer step per minibatch of whole groups
    meter, loss_parts, divisors = dist.Meter(), [], []
    minibatches = packing.minibatches(examples, args.group, serials, all_serials, args.minibatches)
    for k, minibatch in enumerate(minibatches):
        targets, sequences = dist.all_sums(sum(e.num_targets for e in minibatch), len(minibatch))
        divisor = losses.divisor(args.agg, targets, sequences, args.max_new_tokens)
        divisors.append(divisor)
        # If the policy loss is the only term, a sequence with advantage 0 has no gradient: it
        # counts in the divisor but needs no forward pass (so the entropy metric skips it). The KL
        # has a gradient there, and a term of your own may too: then keep all sequences.
        if reference is None:
            minibatch = [e for e in minibatch if e.columns["adv"].any()]
        # Ranks run equally many micro-batches, padded with dummies: each pass is a collective.
        for batch in batches(model, minibatch, args.tokens, world.device):
            logp_N, entropy_N = model(batch, args.temperature)
            log_ratio_N = losses.log_ratio(logp_N, batch["old_logp"], batch.sequences, args.ratio)
            weight_N = losses.token_weights(batch.sequences, args.agg)
            correction_N, correction_metrics = correction(
                batch["old_logp"], batch["engine_logp"], batch.sequences
            )
            loss, metrics = policy_loss(log_ratio_N, logp_N, batch["adv"], weight_N * correction_N)
            if reference is not None:
                kl_N = kl_estimate(logp_N, batch["ref_logp"])
                loss = loss + args.beta * (weight_N * kl_N).sum()
                metrics["kl"] = kl_N.sum()
            (loss / divisor).backward()
            tape.add(batch, logp=logp_N, entropy=entropy_N, loss=loss)
            loss_parts.append(loss.detach().double() / divisor)
            metrics |= correction_metrics
            meter.add(batch.num_targets, entropy=entropy_N.sum(), **metrics)
            if k == 0:  # before the first update, engine and trainer are the same policy
                same_N = batch["version"] == step - 1  # unless the rollouts ran ahead
                gap.add(logp_N, batch["engine_logp"], batch.mask_N, same_N)
        grad_norm = dist.clip_grad_norm(model, args.grad_clip)
        check_finite(grad_norm, step, model, minibatch, tokenizer.decode)
        update = (step - 1) * args.minibatches + k + 1
        lr = optim.learning_rate(update, args.steps * args.minibatches, args.lr, args.warmup)
        optim.set_learning_rate(optimizer, lr)
        tape.update(minibatch, grad_norm, lr)
        # Without a trained token AdamW would still decay the weights and follow its momentum.
        if dist.all_sum(sum(e.num_targets for e in minibatch)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.lap("train")

    # ---- sync
    engine.sync_weights(dist.full_weights(model), step)
    clock.lap("sync")

    # ---- log
    unrewarded_PG = reward_PG.isnan()
    meter.add((~unrewarded_PG).sum(), reward=reward_PG[~unrewarded_PG])
    meter.add(reward_PG.numel(), **{"completions/unrewarded": unrewarded_PG.sum()})
    meter.add(len(reward_PG), reward_std=advantages.std(reward_PG))
    sampled = dist.all_sum(sum(r.length for r in rollouts))
    state["num_tokens"] += sampled
    state["rewards"] = rewards.states(reward_functions)
    reward_names = [f"rewards/{f.name}/mean" for f in reward_functions]
    metrics = {
        **meter.means(),
        **dist.means(rewards.sums(reward_names, reward_FPG)),
        **length_metrics(groups),
        **staleness_metrics(rollouts, step - 1),
        **gap.metrics(),
        "loss": dist.all_sum(torch.stack(loss_parts)) / args.minibatches,
        "frac_reward_zero_std": dist.all_sum(equal) / drawn,
        "grad_norm": grad_norm,
        "lr": lr,
        "groups": len(all_serials),
        "prompts_drawn": drawn,
        "num_tokens": state["num_tokens"],
        **clock.metrics(sampled),
    }
    if run.due(step, args.eval_every):
        metrics |= evaluate()
    run.log(step, metrics)
    run.say(standstill.hint(metrics["frac_reward_zero_std"] == 1, optim.EQUAL_REWARDS))
    numbers = {"reward": reward_PG.flatten(), "advantage": adv_PG.flatten()}
    run.samples(step, sample_records(tokenizer.decode, rollouts[: args.group], **numbers))
    if args.record:
        run.record(
            step,
            examples,
            {"divisors": divisors},
            tape,
            serial=serials,
            rewards=reward_FPG.flatten(1).T.tolist(),
            finish=[r.finish for r in rollouts],
        )
    gap.check(step)

    # ---- save
    if run.due_save(step, args.save_every, args.save_minutes):
        run.save(step, model, optimizer, state)

# --------------------------------------------------------------------------------------------- save
engine.close()
files = tokenizer_files(args.model, tokenizer)
run.export(dist.full_weights(model), model.config, files, args.save_dtype)
run.finish()
