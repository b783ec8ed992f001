"""DPO and its family: make the chosen answer likelier than the rejected one, measured against a reference.

    c = log pi(y_chosen | x) - log ref(y_chosen | x), summed over its tokens; r the same of the rejected one
    loss = - sum_p log sigmoid(beta (c_p - r_p)) / P        P: pairs of the optimizer step (2305.18290, eq. 7)

--loss: sigmoid sigmoid_norm ipo hinge robust exo nca bco sppo aot aot_unpaired apo_zero apo_down discopop simpo sft cpo
orpo kto, or several (losses.PREFERENCE, with their papers). Where pairs depend on each other (bco, aot*, kto) log-probs
of the whole step are taken first, over all ranks, so that its gradient depends on no micro-batch.
--online samples them from the policy: of --group answers the best and the worst by --reward or --judge (2402.04792).

    python train_sft.py && python train_dpo.py [--online]           # the toy: its own slips against the right sums
    torchrun --nproc_per_node 8 train_dpo.py --model out/sft --data pairs.jsonl --beta 0.1
"""

import argparse
import math
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

from nanopost import checkpoint, dist, hf, optim, packing, pairs, preference, rewards, toy
from nanopost.batch import batch_of
from nanopost.cli import Help, check_numbers, refuse
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.forward import logprobs
from nanopost.reference import add_cached_reference, add_reference, content_hash, follow
from nanopost.rollout import length_metrics, sample_records
from nanopost.rows import load as load_rows
from nanopost.run import Logger
from nanopost.tokenizer import Tokenizer, check_stage, fingerprint, marked_text, tokenizer_files

# N packed tokens of a micro-batch, S its sequences: 2p is the chosen one of pair p, 2p + 1 the rejected one.
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
    help="columns, such as better=chosen worse=rejected",
)
add("--out", default="out/dpo", help="folder of the run; the trained model is written here")
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
add(
    "--lr",
    type=float,
    help="peak learning rate; default 1e-6, for the toy 2e-4, with --online 5e-4",
)
add("--schedule", default="linear", choices=["constant", "linear", "cosine"])
add("--warmup", type=int, default=20, help="steps from 0 to --lr, at most half of the run")
add("--weight_decay", type=float, default=0.0)
add("--betas", type=float, nargs=2, default=[0.9, 0.95])
add("--grad_clip", type=float, default=1.0, help="largest L2 norm of the gradient; 0: any")
add("--eval_every", type=int, default=100, help="steps; 0: only before and after")
add("--save_every", type=int, default=100, help="steps between checkpoints to resume from; 0: none")
add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
add("--overwrite", action="store_true", help="replace the run that --out holds")
add("--verbose", action="store_true", help="say when each phase begins")
# Of this algorithm alone:
add("--steps", type=int, default=120, help="optimizer steps")
add("--epochs", type=float, help="instead of --steps: times over the pairs or prompts")
add(
    "--rows",
    type=int,
    default=64,
    help="pairs (or prompts, --online) of an optimizer step, over all ranks",
)
add(
    "--loss",
    nargs="+",
    default=["sigmoid"],
    choices=preference.PREFERENCE,
    metavar="LOSS",
    help="see above",
)
add("--loss_weights", type=float, nargs="+", help="one for each --loss; default: all 1")
add(
    "--beta",
    type=float,
    help="how much a log-ratio counts (ipo: tau); default 0.1, for the toy 1, --online 0.1",
)
add(
    "--smoothing",
    type=float,
    default=0.0,
    help="share of pairs thought to be swapped, for losses that know it",
)
add("--gamma", type=float, default=0.5, help="simpo: target margin")
add(
    "--label_weights",
    type=float,
    nargs=2,
    default=(1.0, 1.0),
    help="kto: of desirable, of undesirable rows",
)
add("--divergence", default="reverse_kl", choices=["reverse_kl", "forward_kl", "js", "alpha"])
add("--alpha", type=float, default=0.5, help="of --divergence alpha")
add(
    "--ld_alpha",
    type=float,
    default=1.0,
    help="weight of tokens past the shorter answer's length (LD-DPO 2409.06411)",
)
add(
    "--wpo",
    action="store_true",
    help="weigh pairs by how likely the policy is to write them (WPO 2406.11827)",
)
add(
    "--reference",
    default="frozen",
    choices=["frozen", "precomputed", "follow"],
    help="a copy; its log-probs, computed once and cached; a copy that follows (TR-DPO 2404.09656)",
)
add("--reference_model", help="folder; default: --model")
add(
    "--follow_every",
    type=int,
    default=64,
    help="follow: steps between moves of 0.6 of the way to the policy",
)
add("--cache", default="out/cache", help="folder for precomputed log-probs")
add("--max_length", type=int, help="longest side of a pair in tokens; default: half of --tokens")
add(
    "--overlong",
    default="truncate",
    choices=["truncate", "drop"],
    help="what becomes of longer pairs",
)
add("--online", action="store_true", help="sample the pairs from the policy")
add("--group", type=int, default=4, help="samples of a prompt")
add("--max_new_tokens", type=int, help="longest completion; default 512, for the toy 8")
add(
    "--max_prompt",
    type=int,
    help="leave out longer prompts, in tokens; default: refuse those that do not fit",
)
add("--temperature", type=float, default=1.0)
add(
    "--reward",
    nargs="*",
    metavar="REWARD",
    help="as in train_grpo.py; offline to evaluate; the toy's is exact",
)
add("--reward_weights", type=float, nargs="+", help="one for each --reward; default: all 1")
add(
    "--judge",
    metavar="file.py:f",
    help="f(prompts, pairs of texts) -> 0, 1 or None each; an answer's wins are added",
)
add(
    "--eos_penalty",
    type=float,
    default=1.0,
    help="taken from the reward of a completion without an end",
)
add("--engine_rows", type=int, default=512, help="completions sampled at once on a rank")
args = parser.parse_args()
args.max_new_tokens = (
    args.max_new_tokens if args.max_new_tokens is not None else 8 if args.data == "toy" else 512
)
args.reward = (["exact"] if args.data == "toy" else []) if args.reward is None else args.reward
toy_lr, toy_beta = (5e-4, 0.1) if args.online else (2e-4, 1.0)
args.lr = args.lr if args.lr is not None else toy_lr if args.data == "toy" else 1e-6
args.beta = args.beta if args.beta is not None else toy_beta if args.data == "toy" else 0.1

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
kto, coupled = "kto" in args.loss, bool(preference.COUPLED & {*args.loss})
reference, reference_model = None, args.reference_model or args.model
if not preference.REFERENCE_FREE.issuperset(args.loss):
    reference = hf.load_model(reference_model, world.device, shard=shard).requires_grad_(False)
following = reference if args.reference == "follow" else None
tokenizer.check_same(reference_model, "--reference_model ")
stage = "\n".join(filter(None, {stage, check_stage(reference_model, tokenizer)}))
engine = None
if args.online or args.reward:
    shared = world.size == 1 and not bf16  # then the engine samples with the trainer's own tensors
    sampler = (
        model
        if shared
        else hf.load_model(args.model, world.device, torch.bfloat16 if bf16 else torch.float32)
    )
    engine = Engine(sampler, tokenizer.stop_ids, tokenizer.decode, args.engine_rows)

# ------------------------------------------------------------------------------------------------------------ data
refuse(
    (args.online and args.group < 2, f"--group {args.group} makes no pairs: give 2 or more."),
    (args.online and not args.reward and not args.judge, "--online needs --reward or --judge."),
    (
        args.online and (kto or args.reference == "precomputed"),
        "--online goes neither with kto nor precomputed.",
    ),
    (
        kto and len(args.loss) > 1,
        "--loss kto pairs a row with another's answer: it goes with no other loss.",
    ),
    (
        args.divergence != "reverse_kl" and not preference.OF_MARGINS.issuperset(args.loss),
        f"--divergence {args.divergence} is known to {', '.join(sorted(preference.OF_MARGINS))}.",
    ),
    (args.wpo and coupled, "--wpo does not go with bco, aot, aot_unpaired or kto."),
    (
        len(args.loss_weights or args.loss) != len(args.loss),
        "--loss_weights: give one for each --loss.",
    ),
)
if args.data == "toy":
    toy.check(tokenizer, args.model)
    rows, eval_rows = (toy.pair_rows(args.model, held_out) for held_out in (False, True))
    prompts, eval_prompts = (toy.prompt_rows(held_out) for held_out in (False, True))
else:
    prompts, eval_prompts = rows, eval_rows = load_rows(
        args.data, args.eval_data, args.holdout, args.rename
    )
if engine:
    parts, room = (
        (prompts * args.online, eval_prompts),
        (args.tokens, model.config.max_positions, 1 + args.online),
    )
    (prompts, eval_prompts), _ = tokenizer.with_prompts(
        parts, args.max_prompt, args.max_new_tokens, *room
    )
max_length = args.max_length or args.tokens // 2


def encode(rows):
    """Rows, offline -> (pairs with the columns that a loss reads, counts of what was left out)."""
    if kto:
        found, cut = pairs.labelled(tokenizer, rows, max_length, args.overlong)
    else:
        found, cut = pairs.fit([tokenizer.pair(row) for row in rows], max_length, args.overlong)
    pairs.add_columns(found, args.ld_alpha, train_prompt="orpo" in args.loss)
    if args.reference == "precomputed":
        name = (
            f"{hf.content_hash(reference_model)}-{'bf16' if bf16 else 'fp32'}-{content_hash(found)}"
        )
        add_cached_reference(
            found, reference, args.tokens, world, Path(args.cache, f"reference-{name}.npy")
        )
    return found, cut


(all_pairs, cut), (eval_pairs, eval_cut) = (
    [([], {})] * 2 if args.online else (encode(rows), encode(eval_rows))
)
reference = (
    reference if args.reference != "precomputed" or args.reward else None
)  # else it has said all it has to
per_epoch = len(prompts if args.online else all_pairs)
args.steps = math.ceil(args.epochs * per_epoch / args.rows) if args.epochs else args.steps
reward_functions, reward_weights = (
    rewards.load_rewards(args.reward, args.reward_weights, tokenizer, world.device)
    if args.reward or args.reward_weights
    else ([], [])
)
judge = args.judge and rewards.load_reward(args.judge)

# ------------------------------------------------------------------------------------------------------- optimizer
optimizer = optim.adamw(model, args.weight_decay, args.betas)
found = checkpoint.to_resume(args) if args.resume else None
state = {"step": 0, "consumed": 0, "seen": 0, "reward_sum": 0.0, "reward_count": 0}
state |= checkpoint.load(found, model, optimizer, following) if found else {}
shown = [
    "reward",
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "entropy",
    "grad_norm",
    "lr",
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
if all_pairs:
    logger.say(
        f"{args.data}: {len(all_pairs):,} pairs; cut, left out or doubtful: {packing.counted(cut)}; of the "
        f"{len(eval_pairs):,} held out: {packing.counted(eval_cut)}; the first:"
    )
    logger.say("\n".join(marked_text(e, tokenizer) for e in all_pairs[0]))
logger.say(
    f"a step is {args.rows} of the {per_epoch:,} {'prompts' if args.online else 'pairs'} of an epoch"
)


def sampled(rows, serials, n, temperature):
    """n completions of each row's prompt, scored -> (rollouts [P][n], float64 reward_PG)."""
    seeds, sampling = (
        [prompt_seed(args.seed, s) for s in serials],
        Sampling(args.max_new_tokens, temperature),
    )
    groups = engine.generate([row["prompt_ids"] for row in rows], n, sampling, seeds)
    return groups, rewards.total_reward(
        reward_functions, reward_weights, judge, tokenizer.decode, rows, groups, n
    )


def online(rows, serials):
    """Of each row's samples the best and the worst, but for ties -> (pairs, what samples.jsonl shows, metrics)."""
    groups, reward_PG = sampled(rows, serials, args.group, args.temperature)
    flat = [r for group in groups for r in group]
    reward_PG -= args.eos_penalty * torch.tensor([r.finish == "length" for r in flat]).view_as(
        reward_PG
    )
    new = pairs.best_and_worst(groups, reward_PG)
    pairs.add_columns(new, args.ld_alpha, train_prompt="orpo" in args.loss)
    return (
        new,
        sample_records(tokenizer.decode, flat[: args.group], reward=reward_PG.flatten()),
        dist.means(
            {
                "reward": (reward_PG.sum(), reward_PG.numel()),
                "ties": (len(groups) - len(new), len(groups)),
            }
        )
        | length_metrics(flat),
    )


def loss_of(p):
    """loss_P: the weighted sum of the losses asked for."""
    more = {
        "simpo": {"gamma": args.gamma},
        "kto": dict(zip(("desirable", "undesirable"), args.label_weights)),
        "bco": {"shift": state["reward_sum"] / max(1, state["reward_count"])},
    }
    return sum(
        weight * preference.PREFERENCE[name](p, args.beta, args.smoothing, **more.get(name, {}))
        for name, weight in zip(args.loss, args.loss_weights or [1.0] * len(args.loss))
    )


def add_metrics(sums, p, loss_P, share):
    """share: 1; 0 for what stands in for no pairs; 1 / world.size for pairs that every rank holds."""
    for name, (total, n) in preference.preference_metrics(p, loss_P, args.beta, kto).items():
        sums[name] = sums[name][0] + share * float(total), sums[name][1] + share * float(n)


def evaluate():
    """Held-out pairs; and with --reward held-out prompts, sampled: mean reward, and KL(policy || reference)."""
    mine, sums = eval_pairs[world.rank :: world.size], defaultdict(lambda: (0.0, 0.0))
    if eval_pairs:
        if args.reference != "precomputed":
            add_reference(mine, reference, args.tokens, world.device)
        p, _ = preference.gathered(model, mine, args.tokens, world.device, **divergence)
        add_metrics(sums, p, loss_of(p), 1 / world.size)
    metrics = {f"eval/{name}": value for name, value in dist.means(sums).items()}
    mine = range(len(eval_prompts))[world.rank :: world.size]
    for name, temperature in (
        (("accuracy", 1.0), ("greedy", 0.0)) if args.reward and eval_prompts else ()
    ):
        groups, reward_PG = sampled(
            [eval_prompts[i] for i in mine], [2**32 + i for i in mine], 1, temperature
        )
        metrics |= dist.means({f"eval/{name}": (reward_PG.sum(), reward_PG.numel())})
        if temperature and reference:
            examples = [r.example() for group in groups for r in group]
            logps = logprobs(reference, examples, args.tokens, 1.0, world.device)
            kl_B = [
                float((e.columns["engine_logp"] - logp).sum()) for e, logp in zip(examples, logps)
            ]
            metrics |= dist.means({"eval/kl": (sum(kl_B), len(kl_B))})
    return metrics


# ------------------------------------------------------------------------------------------------------------ loop
divergence = {"divergence": args.divergence, "alpha": args.alpha}
consumed, seen = state["consumed"], state["seen"]
state["args"] = vars(args)
if engine:
    engine.sync_weights(dist.full_weights(model), state["step"])
if not found:
    logger.log(0, state.setdefault("first", evaluate()))
for step in range(state["step"] + 1, args.steps + 1):
    # ---- pairs
    logger.phase("pairs", step)
    began = time.perf_counter()
    serials = range(consumed, consumed + args.rows)[world.rank :: world.size]
    indices = packing.take(per_epoch, args.seed, consumed, args.rows)[world.rank :: world.size]
    consumed += args.rows
    step_pairs, records, metrics = (
        online([prompts[i] for i in indices], serials)
        if args.online
        else ([all_pairs[i] for i in indices], [], {})
    )
    if args.reference != "precomputed":
        add_reference(step_pairs, reference, args.tokens, world.device)
    count, chosen_tokens = dist.all_sum(
        len(step_pairs), sum(chosen.num_targets for chosen, _ in step_pairs)
    )
    units, sums = step_pairs, defaultdict(lambda: (0.0, 0.0))
    if coupled:  # the gradient of each sequence's log-prob, from the losses of the whole step
        p, mine = preference.gathered(model, step_pairs, args.tokens, world.device, **divergence)
        state["reward_sum"] += float(args.beta * p.ratio_2P.detach().sum())
        state["reward_count"] += len(p.logp_S)
        (loss_P := loss_of(p)).sum().backward()
        units = preference.pulled_back(step_pairs, p, mine)
        add_metrics(sums, p, loss_P, 1 / world.size)

    # ---- update
    logger.phase("update", step)
    lengths, entropy_sum = [sum(map(len, unit)) for unit in units], 0.0
    for part in dist.even(packing.micro_batches(lengths, args.tokens) or [[]]):
        batch = batch_of([e for i in part for e in units[i]], world.device)
        logp_N, entropy_N = model(batch)
        p = preference.of_batch(batch, logp_N, chosen_tokens / max(1, count), **divergence)
        if coupled:
            loss = (batch["slope"] * p.logp_S + batch["nll_slope"] * p.nll_S).sum()
        else:
            loss_P = loss_of(p) * (not batch.dummy)
            if args.wpo:
                with torch.no_grad():
                    half_logp_N, _ = model(batch, 0.5)
                loss_P = loss_P * preference.wpo_weight(
                    logp_N, half_logp_N, batch["weight"], batch.seq_N, len(p.logp_S)
                )
            loss = loss_P.sum()
            add_metrics(sums, p, loss_P, not batch.dummy)
        (
            loss * world.size / max(1, count)
        ).backward()  # FSDP averages gradients over ranks: world.size undoes it
        entropy_sum += float(entropy_N.detach().sum())
    grad_norm = dist.clip_grad_norm(model, args.grad_clip)
    lr = optim.learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
    optim.set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    # ---- sync
    logger.phase("sync", step)
    if following and step % args.follow_every == 0:
        follow(reference, model, share=0.6)
    if engine:
        engine.sync_weights(dist.full_weights(model), step)

    # ---- log
    (tokens,) = dist.all_sum(sum(lengths))
    seen += tokens
    sums["entropy"] = entropy_sum, sum(e.num_targets for unit in units for e in unit)
    metrics |= {
        **dist.means(sums),
        "grad_norm": grad_norm,
        "lr": lr,
        "epoch": consumed / per_epoch,
        "pairs": count,
        "num_tokens": seen,
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }
    if step == args.steps or args.eval_every and step % args.eval_every == 0:
        logger.phase("eval", step)
        metrics |= (last := evaluate())
    logger.log(step, metrics)
    logger.samples(step, records)

    # ---- save
    if args.save_every and step % args.save_every == 0 and step < args.steps:
        logger.phase("save", step)
        checkpoint.save(
            args.out,
            step,
            model,
            optimizer,
            state | {"consumed": consumed, "seen": seen},
            following,
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
