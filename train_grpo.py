"""GRPO and its family: sample a group of answers to each prompt, reward them, make the better ones likelier.

    A_i  = (R_i - mean(R_group)) / (std(R_group) + 1e-4)                            2402.03300, eq. 3 (outcome form)
    r_t  = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss = - sum_i sum_t w_it min(r_t A_i, clip(r_t, 1 - low, 1 + high) A_i) + beta sum_it w_it KL_it

    --adv    group: as above; mean: without the std (Dr. GRPO 2503.20783); loo: leave-one-out (RLOO 2402.14740);
             batch: the std of the whole batch; gdpo: each reward z-scored in its group, then their sum (2601.05242)
    --ratio  token; sequence: exp of the mean over tokens (GSPO 2507.18071); sequence_sum: of the sum (RLOO)
    --agg    w_it = sequence: 1 / (|y_i| sequences) (GRPO); token: 1 / tokens of the whole optimizer step
             (DAPO 2503.14476, the default); constant: 1 / (sequences * --max_new_tokens) (Dr. GRPO);
             sequence_sum: 1 / sequences (LUSPO 2602.05261, with --ratio sequence)
    --loss   clip: as above, with --delta capping the ratio on the other side; cispo 2506.13585; sapo 2511.20347
Deviations from the GRPO paper: no KL by default (--beta 0), aggregation by token, old log-probs that are the engine's.

    python train_sft.py && torchrun --nproc_per_node 1 train_grpo.py            # the toy, about three minutes
    torchrun --nproc_per_node 8 train_grpo.py --model out/sft --data prompts.jsonl --reward gsm8k
"""

import argparse
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanopost import advantages, checkpoint, dist, hf, losses, optim, packing, rewards, toy
from nanopost.batch import batch_of, padded
from nanopost.cli import Help, check_numbers, refuse
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.forward import logprobs, per_token
from nanopost.rollout import LogpGap, length_metrics, sample_records
from nanopost.rows import load as load_rows
from nanopost.run import Logger
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, tokenizer_files

# N packed tokens of a micro-batch, S its sequences, P prompts, G samples of a prompt, F reward functions.
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
add("--out", default="out/grpo", help="folder of the run; the trained model is written here")
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
add("--lr", type=float, help="peak learning rate; default 1e-6, for the toy 1e-3")
add("--schedule", default="linear", choices=["constant", "linear", "cosine"])
add(
    "--warmup", type=int, default=10, help="optimizer steps from 0 to --lr, at most half of the run"
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
add("--steps", type=int, default=100, help="rollout batches; each is --minibatches optimizer steps")
add("--prompts", type=int, default=64, help="prompts of a rollout batch, over all ranks")
add("--group", type=int, default=8, help="samples of a prompt")
add("--minibatches", type=int, default=2, help="optimizer steps on a rollout batch")
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
add("--reward_weights", type=float, nargs="+", help="one for each --reward; default: all 1")
add(
    "--resample",
    type=int,
    default=0,
    help="rounds of prompts that replace groups with equal rewards; 0: they stay",
)
add("--mask_overlong", action="store_true", help="completions without an end stay out of the loss")
add("--adv", default="group", choices=["group", "mean", "loo", "batch", "gdpo"], help="advantage")
add(
    "--ratio",
    default="token",
    choices=["token", "sequence", "sequence_sum"],
    help="importance ratio",
)
add("--loss", default="clip", choices=["clip", "cispo", "sapo"])
add("--clip_low", type=float, default=0.2)
add("--clip_high", type=float, default=0.2)
add(
    "--delta", type=float, help="clip: largest ratio whatever the sign of the advantage (two-sided)"
)
add("--cispo_cap", type=float, default=5.0, help="cispo: largest ratio")
add(
    "--sapo_tau",
    type=float,
    nargs=2,
    default=[1.0, 1.05],
    help="sapo: of positive, of other advantages",
)
add(
    "--agg",
    default="token",
    choices=["sequence", "token", "constant", "sequence_sum"],
    help="how losses are averaged",
)
add(
    "--top_entropy",
    type=float,
    default=1.0,
    help="share of tokens, the most uncertain, that learn (2506.01939)",
)
add("--entropy_coef", type=float, default=0.0, help="weight of an entropy bonus")
add(
    "--off_policy_mask",
    type=float,
    help="fall of the mean log-prob that takes bad answers out (2512.02556)",
)
add(
    "--beta",
    type=float,
    default=0.0,
    help="weight of the KL to the model as it was; 0: no reference model",
)
add("--kl", default="k3", choices=["k1", "k2", "k3"], help="estimator of that KL")
add("--kl_in", default="loss", choices=["loss", "reward"])
add(
    "--old_logp",
    default="engine",
    choices=["engine", "trainer"],
    help="whose log-probs the ratio divides by",
)
add(
    "--correct",
    default="none",
    choices=["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"],
    help="importance weights trainer / engine; needs --old_logp trainer",
)
add("--correct_cap", type=float, default=3.0, help="largest such weight")
add(
    "--max_logp_gap",
    type=float,
    help="mean |trainer - engine| log-prob that stops the run; default 1e-3, in bf16 0.1",
)
add("--engine_rows", type=int, default=512, help="completions sampled at once on a rank")
args = parser.parse_args()
args.reward = args.reward or ["exact"] * (args.data == "toy")
args.lr = args.lr if args.lr is not None else 1e-3 if args.data == "toy" else 1e-6
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
model = hf.load_model(args.model, world.device, shard=shard)
reference = (
    hf.load_model(args.model, world.device, shard=shard).requires_grad_(False)
    if args.beta
    else None
)
shared = world.size == 1 and not bf16  # then the engine samples with the trainer's own tensors
sampler = (
    model
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
    (args.group < 2, f"--group {args.group} has nothing to compare a sample with: give 2 or more."),
    (args.correct != "none" and args.old_logp != "trainer", "--correct needs --old_logp trainer."),
    (
        args.adv == "gdpo" and args.kl_in == "reward",
        "--adv gdpo takes no KL in the reward: --kl_in loss.",
    ),
    (
        args.temperature <= 0,
        f"--temperature {args.temperature}: training samples, so give more than 0.",
    ),
)

# ------------------------------------------------------------------------------------------------------- optimizer
optimizer = optim.adamw(model, args.weight_decay, args.betas)
found = checkpoint.to_resume(args) if args.resume else None
state = checkpoint.load(found, model, optimizer) if found else {"step": 0, "consumed": 0, "seen": 0}
shown = [
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "loss",
    "grad_norm",
    "completions/mean_length",
    "completions/clipped_ratio",
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
engine.sync_weights(dist.full_weights(model), state["step"])
state["args"] = vars(args)
if not found:
    logger.log(0, state.setdefault("first", evaluate()))
for step in range(state["step"] + 1, args.steps + 1):
    # ---- rollout and reward, until --prompts groups have something to teach
    logger.phase("rollout", step)
    began = time.perf_counter()
    groups, rewards_of, drawn, zero_std, missing = [], [], 0, 0, args.prompts
    for _ in range(args.resample + 1):
        count = -(-missing // world.size) * world.size
        serials = range(consumed + drawn, consumed + drawn + count)[world.rank :: world.size]
        indices = packing.take(len(rows), args.seed, consumed + drawn, count)[
            world.rank :: world.size
        ]
        drawn += count
        new_groups, reward_FPG = rollout([rows[i] for i in indices], serials, args.group, sampling)
        total_PG = rewards.combine_rewards(reward_FPG, reward_weights)
        varied_P = total_PG.std(1) > 1e-8
        zero_std += int((~varied_P).sum())
        keep_P = varied_P | (args.resample == 0)
        groups += [group for group, keep in zip(new_groups, keep_P) if keep]
        rewards_of.append(torch.cat([reward_FPG, total_PG[None]])[:, keep_P])
        missing = args.prompts - int(dist.all_sum(len(groups))[0])
        if missing <= 0:
            break
    if missing == args.prompts:
        checkpoint.save(
            args.out, step - 1, model, optimizer, state | {"consumed": consumed, "seen": seen}
        )
    refuse(
        (
            missing == args.prompts,
            f"step {step}: in {args.resample + 1} rounds of {args.prompts} prompts every group"
            f" of {args.group} had equal rewards: warm up with train_sft.py, change prompts or --reward, or raise "
            "--group. The weights are saved: --resume goes on from them.",
        )
    )
    consumed += drawn
    *reward_FPG, reward_PG = torch.cat(rewards_of, 1)
    flat = [r for group in groups for r in group]
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
    if reference is not None and args.kl_in == "reward":
        old_BT, ref_BT = (padded(examples, name) for name in ("old_logp", "ref_logp"))
        reward_PG = reward_PG - args.beta * losses.kl_estimate(old_BT, ref_BT, args.kl).sum(
            1
        ).view_as(reward_PG)
    if args.adv == "gdpo":
        adv_PG = advantages.normalised_sum(reward_FPG, reward_weights)  # of mean 0
        adv_PG = adv_PG / (dist.mean_and_std(adv_PG)[1] + 1e-4)
    else:
        adv_PG = advantages.group_advantage(reward_PG, args.adv, dist.mean_and_std(reward_PG)[1])
    for e, r, adv in zip(examples, flat, adv_PG.flatten().tolist()):
        e.mask &= r.finish == "stop" or not args.mask_overlong
        e.columns["adv"] = adv * e.mask
    if args.top_entropy < 1:
        entropies = per_token(
            lambda batch: model(batch, args.temperature)[1], examples, args.tokens, world.device
        )
        masks = [e.mask for e in examples]
        for e, learns in zip(
            examples, advantages.most_uncertain(entropies, masks, args.top_entropy, dist.gather)
        ):
            e.columns["adv"] = e.columns["adv"] * learns

    # ---- update: --minibatches optimizer steps, whole groups in each
    logger.phase("update", step)
    sums, loss_sum = defaultdict(float), 0.0
    for k, part in enumerate(
        np.array_split(np.arange(len(examples)).reshape(-1, args.group), args.minibatches)
    ):
        minibatch = [examples[i] for i in part.flatten()]
        trained, sequences = dist.all_sum(sum(int(e.mask.sum()) for e in minibatch), len(minibatch))
        # Without a KL a sequence of advantage 0 has no gradient: it counts in the divisor and needs no forward pass.
        minibatch = [
            e for e in minibatch if e.columns["adv"].any() or reference or args.entropy_coef
        ]
        micro_batches = dist.even(
            packing.micro_batches([len(e) for e in minibatch], args.tokens) or [[]]
        )
        divisor = {
            "token": trained,
            "sequence": sequences,
            "sequence_sum": sequences,
            "constant": sequences * args.max_new_tokens,
        }[args.agg]
        for batch in (batch_of([minibatch[i] for i in m], world.device) for m in micro_batches):
            logp_N, entropy_N = model(batch, args.temperature)
            layout = batch.mask_N, batch.seq_N, batch.num_sequences
            engine_logp_N, old_logp_N, adv_N = (
                batch[name] for name in ("engine_logp", "old_logp", "adv")
            )
            weight_N = policy_weight_N = losses.token_weights(*layout, args.agg)
            log_ratio_N, metrics = losses.log_ratio(logp_N, old_logp_N, *layout, args.ratio), {}
            if args.correct != "none":
                correction_N, metrics = losses.importance_weight(
                    old_logp_N, engine_logp_N, *layout, *args.correct.split("-"), args.correct_cap
                )
                policy_weight_N = weight_N * correction_N
            if args.off_policy_mask is not None:
                keep_N = losses.off_policy_mask(
                    logp_N, engine_logp_N, adv_N, *layout, args.off_policy_mask
                )
                policy_weight_N, metrics["off_policy_ratio"] = (
                    policy_weight_N * keep_N,
                    (~keep_N & batch.mask_N).sum(),
                )
            if args.loss == "cispo":
                loss, more = losses.policy_loss_cispo(
                    log_ratio_N, logp_N, adv_N, policy_weight_N, args.cispo_cap
                )
            elif args.loss == "sapo":
                loss, more = losses.policy_loss_sapo(
                    log_ratio_N, adv_N, policy_weight_N, *args.sapo_tau
                )
            else:
                loss, more = losses.policy_loss_clip(
                    log_ratio_N, adv_N, policy_weight_N, args.clip_low, args.clip_high, args.delta
                )
            metrics |= more
            loss = loss - args.entropy_coef * (weight_N * entropy_N).sum()
            if reference is not None:
                kl_N = losses.kl_estimate(logp_N, batch["ref_logp"], args.kl)
                metrics["kl"] = kl_N.detach().sum()
                loss = loss + (args.beta * (weight_N * kl_N).sum() if args.kl_in == "loss" else 0.0)
            (
                loss * world.size / max(1, divisor)
            ).backward()  # FSDP averages gradients over ranks: world.size undoes it
            loss_sum += float(loss.detach()) / max(1, divisor)
            gap.add(logp_N, engine_logp_N, batch.mask_N * (k == 0))  # before the first update
            metrics |= {"entropy": entropy_N.detach().sum(), "tokens": batch.mask_N.sum()}
            for name, value in metrics.items():
                sums[name] += float(value)
        grad_norm = dist.clip_grad_norm(model, args.grad_clip)
        update = (step - 1) * args.minibatches + k + 1
        lr = optim.learning_rate(
            update, args.steps * args.minibatches, args.lr, args.warmup, args.schedule
        )
        optim.set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # ---- sync
    logger.phase("sync", step)
    engine.sync_weights(dist.full_weights(model), step)

    # ---- log
    tokens = sums.pop("tokens")
    metrics = dist.means(
        {
            "reward": (reward_PG.sum(), reward_PG.numel()),
            "reward_std": (reward_PG.std(1).sum(), len(reward_PG)),
            "frac_reward_zero_std": (zero_std, drawn / world.size),
            **{
                f"rewards/{f.name}/mean": (r.nansum(), (~r.isnan()).sum())
                for f, r in zip(reward_functions, reward_FPG)
            },
            "loss": (loss_sum, args.minibatches / world.size),
            **{name: (value, tokens) for name, value in sums.items()},
        }
    )
    sampled, kept = dist.all_sum(sum(len(r.ids) for r in flat), len(groups))
    seen += sampled
    metrics |= {
        **length_metrics(flat),
        "grad_norm": grad_norm,
        "lr": lr,
        **gap.metrics(),
        "groups": kept,
        "prompts_drawn": drawn,
        "num_tokens": seen,
        "time/rollout": rollout_seconds,
        "time/step": time.perf_counter() - began,
        "tokens_per_second": sampled / (time.perf_counter() - began),
    }
    if step == args.steps or args.eval_every and step % args.eval_every == 0:
        logger.phase("eval", step)
        metrics |= (last := evaluate())
    logger.log(step, metrics)
    logger.samples(
        step,
        sample_records(
            tokenizer.decode,
            flat[: args.group],
            reward=reward_PG.flatten(),
            advantage=adv_PG.flatten(),
        ),
    )
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
    dist.full_weights(model),
    model.config,
    tokenizer_files(args.model, tokenizer),
    write=world.rank == 0,
)
logger.say(f"the model is in {args.out}")
if state["step"] < args.steps:
    logger.say_change(state["first"], last)
dist.finish()
