"""PPO with a learned value function: each token is credited with the change in value it causes.

    r_t     = - beta KL_t, plus the score of the answer at its last sampled token
    delta_t = r_t + gamma V_t+1 - V_t
    adv_t   = delta_t + gamma lam adv_t+1                           GAE, 1506.02438 eq. 16
    R_t     = adv_t + V_old,t
    loss    = - sum_t min(ratio_t adv_t, clip(ratio_t, 1 - low, 1 + high) adv_t) / n
              + value_coef sum_t max((V_t - R_t)^2, (clip(V_t, V_old,t +- c) - R_t)^2) / (2 n)

n: sampled tokens of the minibatch, over all ranks (1707.06347 eq. 7; low and high: --clip, c:
--value_clip). V_t is the value of the state before token t. The value model starts from the reward
model (--reward model:FOLDER), else from the policy; with --value_model head it is a linear head on
the policy.

Of the details of RLHF's PPO (2403.17031), it has: score on the last sampled token, penalty for
answers that do not end, KL in the reward, rewards whitened without shifting their mean,
advantages whitened over all ranks, temperature in the trainer's log-probs, value clipping, epochs
of shuffled minibatches, a learning rate that decays to 0. It lacks: scores normalised over
demonstrations (use --score_scale), Adam's eps of 1e-5, sampling past the end (nothing is padded),
dropout (there is none). In forks/: adaptive KL, early stopping on KL, KL in the loss.

    python train_ppo.py --model out/sft --data prompts.jsonl --reward gsm8k
    torchrun --nproc_per_node 8 train_ppo.py --model out/sft --data prompts.jsonl \\
        --reward model:out/rm --beta 0.05 --eos_penalty 1 --value_lr 5e-6
"""

import torch

from nanopost import InputError, advantages, cli, dist, hf, losses, optim, packing, rewards, rows
from nanopost.batch import add_column, padded
from nanopost.cli import above, at_least
from nanopost.engine import prompt_seed
from nanopost.forward import add_logprobs, add_values, batches, check_finite
from nanopost.plan import end_dry_run
from nanopost.reproducible import row_sums
from nanopost.rollout import LogpGap, length_metrics, sample_records, staleness_metrics
from nanopost.run import Clock
from nanopost.tape import Tape
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# Shapes: N packed tokens of a micro-batch, P prompts, G samples per prompt, B = P G, T sampled
# tokens, F reward functions.

# ---------------------------------------------------------------------------------------- arguments
parser = cli.parser(__doc__, out="out/ppo", lr=1e-6, warmup=10, eval_every=50, save_every=20)
cli.add_rollout_flags(parser)
add = parser.add_argument
add("--steps", type=at_least(1), default=80, help="rollout batches")
add("--prompts", type=at_least(1), default=256, help="prompts per rollout batch, over all ranks")
add("--group", type=at_least(1), default=1, help="samples per prompt")
add("--ppo_epochs", type=at_least(1), default=2, help="passes over a rollout batch")
add("--minibatches", type=at_least(1), default=2, help="optimizer steps per pass")
add(
    "--value_model",
    metavar="FOLDER",
    help="initial value model, or head; default: the reward model, else --model",
)
add("--value_lr", type=at_least(0.0), help="peak learning rate of the value model; default: --lr")
add(
    "--value_warmup",
    type=at_least(0),
    default=0,
    help="rollout batches before the policy starts to learn",
)
add("--value_coef", type=at_least(0.0), default=0.5, help="weight of the value loss")
add(
    "--value_clip",
    type=at_least(0.0),
    default=0.2,
    help="clip range of a value around the old one",
)
add("--gamma", type=at_least(0.0, most=1.0), default=1.0, help="discount per token")
add(
    "--lam",
    type=at_least(0.0, most=1.0),
    default=0.95,
    help="lambda of GAE; 1: Monte-Carlo returns",
)
add("--clip", type=at_least(0.0), nargs=2, default=[0.2, 0.2], metavar=("LOW", "HIGH"))
add(
    "--eos_penalty",
    type=at_least(0.0),
    default=0.0,
    help="subtracted from the score of an answer that does not end",
)
add("--score_scale", action="store_true", help="divide scores by the std of all scores so far")
add("--whiten_rewards", action="store_true", help="scale token rewards to a std of 1")
add("--beta", type=at_least(0.0), default=0.0, help="KL coefficient; 0: no reference model")
add("--kl", default="k1", choices=["k1", "k2", "k3"], help="estimator of the KL")
add(
    "--old_logp", default="engine", choices=["engine", "trainer"], help="whose log-probs are pi_old"
)
add(
    "--max_logp_gap",
    type=above(0.0),
    help="stop if engine and trainer log-probs differ more on average; default 1e-3, bf16 0.1",
)
args = parser.parse_args()

# -------------------------------------------------------------------------------------------- setup
world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)
cli.check_divides("prompts", args.prompts, ranks=world.size, minibatches=args.minibatches)
value_rate = 1.0
if args.value_lr is not None:
    if not args.lr:
        raise InputError(
            "--value_lr needs --lr above 0: to keep the policy fixed, use --value_warmup."
        )
    value_rate = args.value_lr / args.lr
tokenizer = Tokenizer.load(args.model, args.chat_template)
reward_models = [x.removeprefix("model:") for x in args.reward if x.startswith("model:")]
args.value_model = args.value_model or next(iter(reward_models), args.model)
value_folder = None
if args.value_model != "head":
    value_folder = args.value_model
    tokenizer.check_same(value_folder, "--value_model ")
# transformers reads the exported value model at the last non-padding token: if answers end with the
# padding token, no token may count as padding.
pad_id = None if tokenizer.pad_id in tokenizer.stop_ids else tokenizer.pad_id
model = hf.load_actor_critic(args.model, value_folder, world.device, cli.shard(args, world), pad_id)
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

optimizer = optim.adamw(model, args.weight_decay, value=value_rate)
policy_trained = [p for p in model.policy.parameters() if p.requires_grad]
show = ["objective/scores", "objective/kl", "policy/entropy_avg", "val/explained_variance"]
show += ["grad_norm", "completions/mean_length", "loss/value_avg", "loss/policy_avg"]
run = cli.run(args, world, show)
fresh = {"step": 0, "consumed": 0, "num_tokens": 0, "score_sums": (0, 0.0, 0.0)}
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
kl_estimate = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}[args.kl]


def rollout(rows_P, serials, n, sampling):
    """n completions per prompt -> (rollouts [P][n], float64 reward_FPG, NaN where not rewarded)."""
    seeds = [prompt_seed(args.seed, serial) for serial in serials]
    groups = play(engine, rows_P, n, sampling, seeds)
    step = engine.version + 1
    return groups, rewards.score(reward_functions, tokenizer, rows_P, groups, step)


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
    end_dry_run("ppo", vars(args), world, lengths)

# --------------------------------------------------------------------------------------------- loop
# Every rank runs every line, on its share of the data; only `run` asks which rank it is.
gap = LogpGap(args.max_logp_gap, world.dtype)
tape = Tape(args.record)
standstill = optim.Standstill(0 if run.resumed else args.steps)
engine.sync_weights(dist.full_weights(model, "policy."), state["step"])
if not run.resumed:
    run.log(0, evaluate())
for step in range(state["step"] + 1, args.steps + 1):
    # ---- rollout
    clock = Clock()
    indices, serials = engine.share(state["consumed"], args.prompts)
    state["consumed"] += args.prompts
    rows_P = [train_rows[i] for i in indices]
    groups, reward_FPG = rollout(rows_P, serials, args.group, sampling)
    rollouts = [r for group in groups for r in group]
    unended_B = torch.tensor([r.finish == "length" for r in rollouts], dtype=torch.bool)
    score_B = rewards.total(reward_FPG, reward_weights).flatten() - args.eos_penalty * unended_B
    scored_B = ~score_B.isnan()
    engine.sleep()  # if it shares the GPU, its memory is free until the sync
    clock.lap("rollout")

    # ---- log-probs and values of the sampled tokens
    examples = [r.example() for r in rollouts]
    for e, scored in zip(examples, scored_B.tolist()):
        if not scored:  # no reward applies: nothing to learn from
            e.mask[:] = False
            e.columns["engine_logp"] *= e.mask
    if args.old_logp == "trainer" or reference is not None:
        # Both log-probs of the KL are the trainer's: in bf16 the engine's rounding would count.
        add_logprobs(examples, "policy_logp", model, args.tokens, args.temperature, world.device)
    if reference is not None:
        add_logprobs(examples, "ref_logp", reference, args.tokens, args.temperature, world.device)
    source = "policy_logp" if args.old_logp == "trainer" else "engine_logp"
    for e in examples:
        e.columns["old_logp"] = e.columns[source]
    add_values(examples, model, args.tokens, world.device)
    # float64, zero after a row's last sampled token: below, only statistics need a mask
    old_BT, value_BT = padded(examples, "old_logp"), padded(examples, "value")
    policy_BT = ref_BT = torch.zeros_like(old_BT)
    if reference is not None:
        policy_BT, ref_BT = padded(examples, "policy_logp"), padded(examples, "ref_logp")
    length_B = torch.tensor([int(e.mask.sum()) for e in examples], dtype=torch.long)
    sampled_BT = torch.arange(old_BT.shape[1]) < length_B[:, None]

    # ---- advantage: the KL at each token, the score at the last one, and GAE
    reward_BT = -args.beta * kl_estimate(policy_BT, ref_BT)
    kl_reward_B = row_sums(reward_BT)
    scale = 1.0
    if args.score_scale:
        sums = state["score_sums"]
        state["score_sums"], scale = advantages.running_std(sums, score_B[scored_B])
    reward_BT[scored_B, length_B[scored_B] - 1] += score_B[scored_B] / scale
    if args.whiten_rewards:
        reward_BT = advantages.whiten(reward_BT, sampled_BT, shift_mean=False) * sampled_BT
    adv_BT, ret_BT = advantages.gae(reward_BT, value_BT, args.gamma, args.lam)
    add_column(examples, "adv", advantages.whiten(adv_BT, sampled_BT))
    add_column(examples, "ret", ret_BT)
    _, monte_carlo_BT = advantages.gae(reward_BT, value_BT, args.gamma, lam=1.0)

    # ---- update: one optimizer step per minibatch of shuffled prompts
    # During value warm-up, only the value model (or the value head on the policy) learns.
    for p in policy_trained:
        p.requires_grad_(step > args.value_warmup)
    lr = optim.learning_rate(step, args.steps, args.lr, args.warmup)
    optim.set_learning_rate(optimizer, lr)
    meter, divisors = dist.Meter(), []
    seed = args.seed, step
    all_serials = dist.gather(serials)
    minibatches = packing.shuffled_minibatches(
        examples, args.group, serials, all_serials, args.minibatches, args.ppo_epochs, seed
    )
    for k, minibatch in enumerate(minibatches):
        targets = dist.all_sum(sum(e.num_targets for e in minibatch))
        divisors.append(targets)
        # Ranks run equally many micro-batches, padded with dummies: each pass is a collective.
        for batch in batches(model, minibatch, args.tokens, world.device):
            logp_N, entropy_N, value_N = model(batch, args.temperature)
            log_ratio_N = losses.log_ratio(logp_N, batch["old_logp"], batch.sequences, "token")
            weight_N = losses.token_weights(batch.sequences, "token")
            policy_loss, policy_metrics = losses.policy_loss_clip(
                log_ratio_N, logp_N, batch["adv"], weight_N, *args.clip
            )
            value_loss, value_metrics = losses.value_loss(
                value_N, batch["value"], batch["ret"], batch.mask_N, args.value_clip
            )
            loss = policy_loss + args.value_coef * value_loss
            (loss / max(1, targets)).backward()
            tape.add(batch, logp=logp_N, entropy=entropy_N, new_value=value_N, loss=loss)
            metrics = {
                "loss/policy_avg": policy_loss,
                "loss/value_avg": value_loss,
                "policy/approxkl_avg": log_ratio_N.square().sum() / 2,
                "policy/clipfrac_avg": policy_metrics["clip_ratio/region_mean"],
                "policy/entropy_avg": entropy_N.sum(),
                "val/ratio": (log_ratio_N.exp() * batch.mask_N).sum(),
            }
            meter.add(batch.num_targets, **metrics, **value_metrics)
            if k == 0:  # before the first update, engine and trainer are the same policy
                same_N = batch["version"] == step - 1  # unless the rollouts ran ahead
                gap.add(logp_N, batch["engine_logp"], batch.mask_N, same_N)
        grad_norm = dist.clip_grad_norm(model, args.grad_clip)
        check_finite(grad_norm, step, model, minibatch, tokenizer.decode)
        tape.update(minibatch, grad_norm, lr)
        # Without a trained token AdamW would still decay the weights and follow its momentum.
        if targets:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.lap("train")

    # ---- sync
    engine.sync_weights(dist.full_weights(model, "policy."), step)
    clock.lap("sync")

    # ---- log
    objective = {
        "objective/scores": score_B[scored_B],
        "objective/entropy": -old_BT,
        "objective/non_score_reward": kl_reward_B,
        "objective/rlhf_reward": (kl_reward_B + score_B)[scored_B],
    }
    if reference is not None:
        objective["objective/kl"] = policy_BT - ref_BT  # k1, whatever --kl is
    meter.add(scored_B.sum(), **objective)
    meter.add(len(rollouts), **{"completions/unrewarded": (~scored_B).sum()})
    sampled, ended = dist.all_sums(sum(r.length for r in rollouts), (~unended_B).sum())
    state["num_tokens"] += sampled
    state["rewards"] = rewards.states(reward_functions)
    reward_names = [f"rewards/{f.name}/mean" for f in reward_functions]
    metrics = {
        **meter.means(),
        **dist.means(rewards.sums(reward_names, reward_FPG)),
        **length_metrics(groups),
        **staleness_metrics(rollouts, step - 1),
        **gap.metrics(),
        "val/explained_variance": advantages.explained_variance(
            monte_carlo_BT, value_BT, sampled_BT
        ),
        "val/num_eos_tokens": ended,
        "grad_norm": grad_norm,
        "lr": lr,
        "num_tokens": state["num_tokens"],
        **clock.metrics(sampled),
    }
    if run.due(step, args.eval_every):
        metrics |= evaluate()
    run.log(step, metrics)
    _, score_std = dist.mean_and_std(score_B[scored_B])
    run.say(standstill.hint(score_std < 1e-8, optim.EQUAL_REWARDS))
    numbers = {"score": score_B, "advantage": (monte_carlo_BT - value_BT)[:, :1].sum(1)}
    run.samples(step, sample_records(tokenizer.decode, rollouts[:8], **numbers))
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
if value_folder:  # a head is useless without its policy, so it is not exported
    value_weights = dist.full_weights(model, "value.")
    run.export(value_weights, model.value.config, files, args.save_dtype, part="value")
run.export(dist.full_weights(model, "policy."), model.config, files, args.save_dtype)
run.finish()
