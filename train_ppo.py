"""PPO with a learned value function: sample answers, reward them, and credit each token by how it changed the value.

    r_t     = - beta KL_t, and at the last sampled token + score
    delta_t = r_t + gamma V_t+1 - V_t           adv_t = delta_t + gamma lam adv_t+1     GAE, 1506.02438 eq. 16
    loss    = - sum_t min(ratio_t adv_t, clip(ratio_t, 1 - low, 1 + high) adv_t) / T           1707.06347, eq. 7
    + value_coef sum_t max((V_t - R_t)^2, (clip(V_t, V_old +- c) - R_t)^2) / 2T          R_t = adv_t + V_t; T: tokens

V_t is the value of the state in which token t is chosen: of what stands before it. The value model begins as the reward
model (--reward model:FOLDER), else as the policy; --value_model head: a linear head on the policy instead.
Of the details of RLHF's PPO in 2403.17031: done, where their line stands, are the score of the last sampled token, the
penalty for an answer without an end, the KL in the reward, rewards whitened without shifting their mean, advantages
whitened over all ranks, the temperature in the trainer's log-probs, value clipping, several epochs of shuffled
minibatches, Adam, a rate that falls to 0. Left out: scores normalised over demonstrations (--score_scale is for that),
Adam's eps of 1e-5 (torch's is 1e-8), sampling on behind the end (nothing is padded), dropout (the models have none).

    python train_sft.py && python train_ppo.py                      # the toy, rewarded for the right sum
    torchrun --nproc_per_node 8 train_ppo.py --model out/sft --data prompts.jsonl --reward model:out/rm
"""

import argparse
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanopost import advantages, checkpoint, dist, hf, losses, optim, packing, rewards, toy
from nanopost.batch import add_column, batch_of, padded
from nanopost.cli import Help, check_numbers, refuse
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.forward import logprobs, per_token
from nanopost.rollout import LogpGap, length_metrics, sample_records
from nanopost.rows import load as load_rows
from nanopost.run import Logger
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# N packed tokens of a micro-batch, S its sequences, P prompts, G samples of a prompt, B = PG, T sampled tokens.
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
    help="columns, such as question=prompt",
)
add("--out", default="out/ppo", help="folder of the run; the trained model is written here")
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
add("--lr", type=float, help="peak learning rate; default 1e-6, for the toy 5e-4")
add("--schedule", default="linear", choices=["constant", "linear", "cosine"])
add(
    "--warmup", type=int, default=10, help="rollout batches from 0 to --lr, at most half of the run"
)
add("--weight_decay", type=float, default=0.0)
add("--betas", type=float, nargs=2, default=[0.9, 0.95])
add("--grad_clip", type=float, default=1.0, help="largest L2 norm of the gradient; 0: any")
add("--eval_every", type=int, default=50, help="steps; 0: only before and after")
add("--save_every", type=int, default=100, help="steps between checkpoints to resume from; 0: none")
add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
add("--overwrite", action="store_true", help="replace the run that --out holds")
add("--verbose", action="store_true", help="say when each phase begins")
# Of this algorithm alone:
add("--steps", type=int, default=80, help="rollout batches")
add("--prompts", type=int, default=256, help="prompts of a rollout batch, over all ranks")
add("--group", type=int, default=1, help="samples of a prompt")
add("--ppo_epochs", type=int, default=2, help="times over a rollout batch")
add("--minibatches", type=int, default=2, help="optimizer steps in each of these")
add("--max_new_tokens", type=int, help="longest completion; default 512, for the toy 8")
add(
    "--max_prompt",
    type=int,
    help="leave out longer prompts, in tokens; default: refuse those that do not fit",
)
add("--temperature", type=float, default=1.0)
add("--stop", nargs="*", default=[], help="strings that end a completion")
add(
    "--reward",
    nargs="+",
    metavar="REWARD",
    help="exact (the toy's default), gsm8k, boxed, format, regex:PATTERN, length:MAX:BUFFER, model:FOLDER or file.py:f",
)
add(
    "--reward_weights",
    type=float,
    nargs="+",
    help="one for each --reward; default: all 1; 0: only to be watched",
)
add(
    "--value_model",
    metavar="FOLDER",
    help="where the value model begins, or the word head; default: see above",
)
add("--value_lr", type=float, help="peak learning rate of the value model; default: --lr")
add(
    "--value_warmup",
    type=int,
    default=0,
    help="rollout batches in which the value model learns alone",
)
add("--value_coef", type=float, default=0.5)
add("--value_clip", type=float, default=0.2, help="how far a value moves on one rollout batch")
add("--gamma", type=float, default=1.0, help="discount of a token")
add("--lam", type=float, default=0.95, help="of GAE; 1: Monte-Carlo returns")
add("--clip_low", type=float, default=0.2)
add("--clip_high", type=float, default=0.2)
add(
    "--eos_penalty",
    type=float,
    default=0.0,
    help="taken from the score of a completion without an end",
)
add("--score_scale", action="store_true", help="divide scores by the std of all scores so far")
add(
    "--whiten_rewards",
    action="store_true",
    help="give the rewards of tokens a std of 1 about their mean",
)
add(
    "--beta",
    type=float,
    default=0.0,
    help="weight of the KL to the model as it was; 0: no reference model",
)
add("--kl", default="k1", choices=["k1", "k2", "k3"], help="estimator of that KL")
add("--kl_in", default="reward", choices=["loss", "reward"])
add(
    "--kl_target", type=float, help="KL of a completion that --beta is adapted to (1909.08593, 2.2)"
)
add(
    "--kl_stop",
    type=float,
    help="mean (log ratio)^2 / 2 of a minibatch that ends the work on a rollout batch",
)
add(
    "--old_logp",
    default="engine",
    choices=["engine", "trainer"],
    help="whose log-probs the ratio divides by",
)
add(
    "--max_logp_gap",
    type=float,
    help="mean |trainer - engine| log-prob that stops the run; default 1e-3, in bf16 0.1",
)
add("--engine_rows", type=int, default=512, help="completions sampled at once on a rank")
args = parser.parse_args()
args.reward = args.reward or ["exact"] * (args.data == "toy")
args.lr = args.lr if args.lr is not None else 5e-4 if args.data == "toy" else 1e-6
args.max_new_tokens = (
    args.max_new_tokens if args.max_new_tokens is not None else 8 if args.data == "toy" else 512
)

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
reward_models = [spec.removeprefix("model:") for spec in args.reward if spec.startswith("model:")]
args.value_model = args.value_model or (reward_models or [args.model])[0]
value_folder = None if args.value_model == "head" else args.value_model
if value_folder:
    tokenizer.check_same(value_folder, "--value_model ")
pad_id = None if tokenizer.pad_id in tokenizer.stop_ids else tokenizer.pad_id
model = hf.load_actor_critic(args.model, value_folder, world.device, shard, pad_id)
reference = (
    hf.load_model(args.model, world.device, shard=shard).requires_grad_(False)
    if args.beta
    else None
)
shared = world.size == 1 and not bf16  # then the engine samples with the trainer's own tensors
sampler = (
    model.policy
    if shared
    else hf.load_model(args.model, world.device, torch.bfloat16 if bf16 else torch.float32)
)
engine = Engine(sampler, tokenizer.stop_ids, tokenizer.decode, args.engine_rows)

# ------------------------------------------------------------------------------------------------------------ data
if args.data == "toy":
    toy.check(tokenizer, args.model)
    rows, eval_rows = toy.prompt_rows(held_out=False), toy.prompt_rows(held_out=True)
else:
    rows, eval_rows = load_rows(args.data, args.eval_data, args.holdout, args.rename)
(rows, eval_rows), report = tokenizer.with_prompts(
    (rows, eval_rows), args.max_prompt, args.max_new_tokens, args.tokens, model.config.max_positions
)
reward_functions, reward_weights = rewards.load_rewards(
    args.reward, args.reward_weights, tokenizer, world.device
)
packing.check_divides("prompts", args.prompts, ranks=world.size, minibatches=args.minibatches)
refuse(
    (args.kl_target and not args.beta, "--kl_target adapts --beta: give it a first value above 0."),
    (
        args.value_lr is not None and not args.lr,
        "--value_lr beside --lr 0: let --value_warmup hold the policy.",
    ),
    (
        args.temperature <= 0,
        f"--temperature {args.temperature}: training samples, so give more than 0.",
    ),
)

# ------------------------------------------------------------------------------------------------------- optimizer
value_rate = 1.0 if args.value_lr is None else args.value_lr / args.lr
optimizer = optim.adamw(model, args.weight_decay, args.betas, value=value_rate)
found = checkpoint.to_resume(args) if args.resume else None
state = {"step": 0, "consumed": 0, "seen": 0, "beta": args.beta, "scores": (0, 0.0, 0.0)}
state |= checkpoint.load(found, model, optimizer) if found else {}
if found and (args.beta != state["args"]["beta"] or not args.kl_target):
    state["beta"] = args.beta  # what --kl_target made of it goes on only from where it began
shown = [
    "objective/scores",
    "objective/kl",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/explained_variance",
    "grad_norm",
    "completions/mean_length",
    "tokens_per_second",
]
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
    f"{len(rows):,} prompts to train on, {len(eval_rows):,} held out; {report}; rewarded by "
    f"{' '.join(args.reward)}; the first as the model sees it:\n{tokenizer.decode(rows[0]['prompt_ids'])}"
)


def rollout(rows, serials, n, sampling):
    """n completions of each row's prompt, scored -> (rollouts [P][G], float64 reward_FPG, NaN: does not apply)."""
    groups = engine.generate(
        [row["prompt_ids"] for row in rows],
        n,
        sampling,
        [prompt_seed(args.seed, serial) for serial in serials],
    )
    return groups, rewards.score_groups(reward_functions, tokenizer.decode, rows, groups, n)


def evaluate():
    """Held-out prompts, one completion each: mean rewards; eval/accuracy and eval/greedy are the first one's."""
    metrics, mine = {}, range(len(eval_rows))[world.rank :: world.size]
    for name, temperature in (("accuracy", 1.0), ("greedy", 0.0)) if eval_rows else ():
        sampling = Sampling(args.max_new_tokens, temperature, stop=tuple(args.stop))
        _, reward_FPG = rollout(
            [eval_rows[i] for i in mine], [2**32 + i for i in mine], 1, sampling
        )
        names = [f"eval/{name}", *(f"eval/{name}/{f.name}" for f in reward_functions[1:])]
        metrics |= dist.means(
            {n: (r.nansum(), (~r.isnan()).sum()) for n, r in zip(names, reward_FPG)}
        )
    return metrics


# ------------------------------------------------------------------------------------------------------------ loop
sampling = Sampling(args.max_new_tokens, args.temperature, stop=tuple(args.stop))
gap = LogpGap(args.max_logp_gap or (0.1 if bf16 else 1e-3))
consumed, seen = state["consumed"], state["seen"]
engine.sync_weights(dist.full_weights(model, "policy."), state["step"])
state["args"] = vars(args)
if not found:
    logger.log(0, state.setdefault("first", evaluate()))
for step in range(state["step"] + 1, args.steps + 1):
    # ---- rollout and reward
    logger.phase("rollout", step)
    began = time.perf_counter()
    serials = range(consumed, consumed + args.prompts)[world.rank :: world.size]
    indices = packing.take(len(rows), args.seed, consumed, args.prompts)[world.rank :: world.size]
    consumed += args.prompts
    groups, reward_FPG = rollout([rows[i] for i in indices], serials, args.group, sampling)
    reward_PG = rewards.combine_rewards(reward_FPG, reward_weights)
    flat = [r for group in groups for r in group]
    unended_B = torch.tensor([r.finish == "length" for r in flat])
    score_B = reward_PG.flatten() - args.eos_penalty * unended_B
    rollout_seconds = time.perf_counter() - began

    # ---- advantage
    examples = [r.example() for r in flat]
    for e in examples:
        e.columns["old_logp"] = e.columns["engine_logp"]
    for name, scorer in (
        ("old_logp", model if args.old_logp == "trainer" else None),
        ("ref_logp", reference),
    ):
        if scorer is not None:
            logger.phase(name, step)
            for e, logp in zip(
                examples, logprobs(scorer, examples, args.tokens, args.temperature, world.device)
            ):
                e.columns[name] = logp
    logger.phase("value", step)
    values = per_token(
        lambda batch: model(batch, value_alone=True)[2], examples, args.tokens, world.device
    )
    for e, value in zip(examples, values):
        e.columns["value"] = value
    old_BT, value_BT = (padded(examples, name) for name in ("old_logp", "value"))
    sampled_BT = torch.arange(old_BT.shape[1]) < torch.tensor([len(r.ids) for r in flat])[:, None]
    ref_BT = padded(examples, "ref_logp") if reference is not None else old_BT
    kl_BT = losses.kl_estimate(old_BT, ref_BT, args.kl)
    state["scores"] = [
        a + b
        for a, b in zip(
            state["scores"], dist.all_sum(len(score_B), score_B.sum(), score_B.square().sum())
        )
    ]
    count, total, squares = state["scores"]
    std = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    scale = (
        std if args.score_scale and std > 1e-6 * (1 + abs(total / count)) else 1.0
    )  # equal scores have no scale
    reward_BT = -state["beta"] * kl_BT * (args.kl_in == "reward")
    non_score_B = reward_BT.sum(1)
    reward_BT[range(len(flat)), [len(r.ids) - 1 for r in flat]] += score_B / scale
    if args.whiten_rewards:
        mean, std = dist.mean_and_std(reward_BT[sampled_BT])
        reward_BT = ((reward_BT - mean) / (std + 1e-8) + mean) * sampled_BT
    adv_BT, return_BT = advantages.gae(reward_BT, value_BT, args.gamma, args.lam)
    mean, std = dist.mean_and_std(adv_BT[sampled_BT])
    add_column(examples, "adv", (adv_BT - mean) / (std + 1e-8))
    add_column(examples, "return", return_BT)
    _, monte_carlo_BT = advantages.gae(reward_BT, value_BT, args.gamma, 1.0)
    spread, left = (
        dist.mean_and_std(x_BT[sampled_BT])[1]
        for x_BT in (monte_carlo_BT, monte_carlo_BT - value_BT)
    )

    # ---- update: --ppo_epochs times --minibatches optimizer steps, the prompts shuffled alike on every rank
    logger.phase("update", step)
    learning = step > args.value_warmup
    lr = optim.learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
    optim.set_learning_rate(optimizer, lr)
    sums, grad_norm = defaultdict(float), 0.0
    orders = [
        np.random.default_rng((args.seed, step, epoch)).permutation(args.prompts)
        for epoch in range(args.ppo_epochs)
    ]
    for k, part in enumerate(
        part for order in orders for part in np.array_split(order, args.minibatches)
    ):
        mine = [i // world.size for i in part.tolist() if i % world.size == world.rank]
        minibatch = [e for i in mine for e in examples[i * args.group : (i + 1) * args.group]]
        (trained,) = dist.all_sum(sum(int(e.mask.sum()) for e in minibatch))
        micro_batches = dist.even(
            packing.micro_batches([len(e) for e in minibatch], args.tokens) or [[]]
        )
        moved = 0.0
        for batch in (batch_of([minibatch[i] for i in m], world.device) for m in micro_batches):
            logp_N, entropy_N, value_N = model(batch, args.temperature, value_alone=not learning)
            layout = batch.mask_N, batch.seq_N, batch.num_sequences
            value_loss, metrics = losses.value_loss(
                value_N, batch["value"], batch["return"], batch.mask_N, args.value_clip
            )
            loss = args.value_coef * value_loss
            metrics |= {"loss/value_avg": value_loss.detach(), "tokens": batch.mask_N.sum()}
            if learning:
                weight_N = losses.token_weights(*layout, "token")
                log_ratio_N = losses.log_ratio(logp_N, batch["old_logp"], *layout, "token")
                policy_loss, more = losses.policy_loss_clip(
                    log_ratio_N, batch["adv"], weight_N, args.clip_low, args.clip_high
                )
                loss = loss + policy_loss
                if reference is not None and args.kl_in == "loss":
                    kl_N = losses.kl_estimate(logp_N, batch["ref_logp"], args.kl)
                    loss = loss + state["beta"] * (weight_N * kl_N).sum()
                squares = log_ratio_N.detach().square().sum()
                moved += float(squares) / 2
                gap.add(
                    logp_N, batch["engine_logp"], batch.mask_N * (k == 0)
                )  # before the first update
                metrics |= {
                    "loss/policy_avg": policy_loss.detach(),
                    "policy/approxkl_avg": squares / 2,
                    "policy/clipfrac_avg": more["clip_ratio/region_mean"],
                    "policy/entropy_avg": entropy_N.detach().sum(),
                    "val/ratio": (log_ratio_N.detach().exp() * batch.mask_N).sum(),
                }
            (
                loss * world.size / max(1, trained)
            ).backward()  # FSDP averages gradients over ranks: world.size undoes it
            for name, value in metrics.items():
                sums[name] += float(value)
        if args.kl_stop and dist.all_sum(moved)[0] > args.kl_stop * trained:
            optimizer.zero_grad(set_to_none=True)
            break
        grad_norm = dist.clip_grad_norm(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums["updates"] += 1

    # ---- sync
    logger.phase("sync", step)
    engine.sync_weights(dist.full_weights(model, "policy."), step)

    # ---- log
    tokens, updates = sums.pop("tokens"), sums.pop("updates", 0)
    count = len(flat)
    metrics = dist.means(
        {
            "objective/scores": (score_B.sum(), count),
            "objective/entropy": (-old_BT.sum(), count),
            "objective/non_score_reward": (non_score_B.sum(), count),
            "objective/rlhf_reward": ((non_score_B + score_B).sum(), count),
            **{
                f"rewards/{f.name}/mean": (r.nansum(), (~r.isnan()).sum())
                for f, r in zip(reward_functions, reward_FPG)
            },
            **({"objective/kl": ((old_BT - ref_BT).sum(), count)} if reference is not None else {}),
            **{name: (value, tokens) for name, value in sums.items()},
        }
    )
    sampled, ended = dist.all_sum(sum(len(r.ids) for r in flat), (~unended_B).sum())
    seen += sampled
    metrics |= {
        "val/explained_variance": 1 - (left / spread) ** 2 if spread > 1e-6 else 0.0,
        "val/num_eos_tokens": ended,
        **length_metrics(flat),
        "grad_norm": grad_norm,
        "lr": lr,
        "beta": state["beta"],
        **(gap.metrics() if learning else {}),
        "updates": updates,
        "num_tokens": seen,
        "time/rollout": rollout_seconds,
        "time/step": time.perf_counter() - began,
        "tokens_per_second": sampled / (time.perf_counter() - began),
    }
    if args.kl_target and learning:
        state["beta"] = advantages.adapted(state["beta"], metrics["objective/kl"], args.kl_target)
    if step == args.steps or args.eval_every and step % args.eval_every == 0:
        logger.phase("eval", step)
        metrics |= (last := evaluate())
    logger.log(step, metrics)
    logger.samples(
        step,
        sample_records(
            tokenizer.decode,
            flat[:8],
            score=score_B,
            advantage=monte_carlo_BT[:, 0] - value_BT[:, 0],
        ),
    )
    if learning:
        gap.check(step, metrics)

    # ---- save
    if args.save_every and step % args.save_every == 0 and step < args.steps:
        logger.phase("save", step)
        checkpoint.save(
            args.out, step, model, optimizer, state | {"consumed": consumed, "seen": seen}
        )

# ------------------------------------------------------------------------------------------------------------ save
hf.save_model(
    args.out,
    dist.full_weights(model, "policy."),
    model.config,
    tokenizer_files(args.model, tokenizer),
    write=world.rank == 0,
)
if value_folder:
    hf.save_model(
        f"{args.out}/value",
        dist.full_weights(model, "value."),
        model.value.config,
        tokenizer_files(args.model, tokenizer),
        write=world.rank == 0,
    )
logger.say(
    f"the model is in {args.out}, "
    + (
        "the value model in value/ there"
        if value_folder
        else "without the head that gave the values"
    )
)
if state["step"] < args.steps:
    logger.say_change(state["first"], last)
dist.finish()
