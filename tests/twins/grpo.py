"""The twin of train_grpo.py and of its forks."""

import math
from argparse import Namespace
from statistics import median

import numpy as np
import torch

from nanopost import plain
from nanopost.plain import kl_estimate, std, there
from twins import common, rollouts
from twins.rollouts import GAP, Means, positions, spread

SCRIPT = "train_grpo.py"
PLAIN = (
    "--model {place}/model --data {place}/prompts.jsonl --eval_data {place}/prompts_held_out.jsonl "
    "--steps 3 --prompts 4 --group 3 --max_new_tokens 6 --temperature 0.8 --seed 5 "
    "--lr 4e-3 --warmup 2 --weight_decay 0.2 --grad_clip 0.6 --stop e 7 / "
)
TWO = "--reward {place}/reward.py:letters {place}/reward.py:scaled --reward_weights 0.7 -0.45 "
SCALED = "--reward {place}/reward.py:scaled "  # which does not apply to some completions
GAPS = "--max_logp_gap 5 "  # of an engine that lies: see rollouts.lying_engine
RUNS = {
    "grpo": PLAIN + TWO + "--eval_every 2 --eval_rows 3 --tokens 70 --checkpointing full "
    "--kernels torch --engine_rows 7 --engine_tokens 200 --clip 0.02 0.05 --beta 0.3 "
    "--agg sequence",
    "resampled": PLAIN + "--prompts 6 --minibatches 3 --resample 2 --adv batch --agg constant "
    "--clip 0.01 0.03 --reward {place}/rewards.py:rarely --beta 0.1 --kl k2 "
    "--checkpointing selective",
    "other rows": "--model {place}/model --data {place}/puzzles.jsonl --holdout 3 "
    "--rename puzzle=prompt weight=factor --max_prompt 30 --chat_template {place}/chat.jinja "
    "--reward {place}/rewards.py:letters {place}/rewards.py:factors {place}/rewards.py:letters "
    "--steps 3 --prompts 4 --group 2 --minibatches 1 --max_new_tokens 5 --lr 3e-3 --grad_clip 0 "
    "--adv mean --beta 0.2 --seed 2",
    "rloo": PLAIN + SCALED + "--adv loo --ratio sequence_sum --agg sequence --clip 0.1 0.3",
    "luspo": PLAIN + SCALED + "--ratio sequence --agg sequence_sum --clip 0.003 0.004",
    "cispo": PLAIN + TWO + GAPS + "--loss cispo --cispo_cap 1.3",
    "dppo": PLAIN + TWO + GAPS + "--loss dppo --clip 0.0004 0.0007",
    "sapo": PLAIN + TWO + GAPS + "--loss sapo --sapo_tau 0.6 1.7 --agg constant "
    "--data {place}/puzzles.jsonl --eval_data {place}/puzzles.jsonl --rename puzzle=prompt "
    "weight=scale --to_messages",
    "token-truncate": PLAIN + TWO + GAPS + "--old_logp trainer --correct token-truncate "
    "--correct_cap 1.2",
    "token-mask": PLAIN + TWO + GAPS + "--old_logp trainer --correct token-mask "
    "--correct_cap 1.2 --beta 0.2",
    "sequence-truncate": PLAIN + TWO + GAPS + "--old_logp trainer --correct sequence-truncate "
    "--correct_cap 3",
    "sequence-mask": PLAIN + TWO + GAPS + "--old_logp trainer --correct sequence-mask "
    "--correct_cap 2.5",
    "cut": PLAIN + TWO + "--top_k 60 --top_p 0.9 --min_p 0.1 --beta 0.3 --clip 0.02 0.05",
    "cut, corrected": PLAIN + TWO + GAPS + "--top_p 0.8 --old_logp trainer "
    "--correct token-truncate --correct_cap 1.2 --beta 0.2 --kl k2 --tokens 70",
    "stale": PLAIN + "--prompts 6 --minibatches 3 --resample 2 --steps 4 --max_staleness 2 "
    "--reward {place}/rewards.py:rarely --max_logp_gap 5 --old_logp trainer "
    "--correct token-truncate --correct_cap 1.05 --max_new_tokens 9",
    "lora": PLAIN + TWO + "--lora 3 --lora_alpha 5 --rslora --lora_targets o_proj down_proj "
    "--beta 0.3 --lr 2e-2",
    "lora, stale": PLAIN + TWO + "--lora 2 --lr 2e-2 --max_staleness 1 --max_logp_gap 5 "
    "--old_logp trainer --correct token-truncate --beta 0.2",
    "environment": PLAIN + rollouts.TALKS + "--max_turns 2 --agg sequence "
    "--reward environment {place}/rewards.py:letters",
    "experts": PLAIN + TWO + "--model {place}/experts --minibatches 4 --beta 0.1",
    "fork curriculum": PLAIN + TWO,
    "fork distill": PLAIN + TWO + "--teacher {place}/other --beta 0.1 --clip 0.02 0.05",
    "fork echo": PLAIN + rollouts.TALKS + "--max_turns 2 --echo_coef 0.3 --agg sequence",
    "fork entropy_bonus": PLAIN + TWO + "--entropy_coef 0.2 --agg sequence",
    "fork gdpo": PLAIN + TWO + "--adv gdpo",
    "fork kl_reward": PLAIN + SCALED + "--adv loo --ratio sequence_sum --agg sequence --beta 0.3",
    "fork length_penalty": PLAIN + SCALED + "--length_penalty 0.4 --group 4",
    "fork median_baseline": PLAIN + SCALED + "--adv median --group 4",
    "fork multi_turn": PLAIN + TWO + "--turn <|user|>Sure?<|assistant|> --beta 0.1 --top_p 0.7",
    "fork off_policy_mask": PLAIN + TWO + "--off_policy_mask 0.02 --beta 0.1",
    "fork overlong_mask": PLAIN + TWO + "--agg sequence --beta 0.2",
    "fork top_entropy": PLAIN + TWO + "--top_entropy 0.37 --beta 0.2",
    "fork two_sided_clip": PLAIN + TWO + "--clip 0.02 0.01 --delta 1.015",
}
METRICS = rollouts.METRICS | {
    *("echo", "divergence", "eval/accuracy/letters", "eval/greedy/letters"),
    *("reward", "reward_std", "frac_reward_zero_std", "groups", "prompts_drawn"),
    *("loss", "grad_norm", "lr", "entropy", "kl", "cispo_clip_ratio"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("sampling/importance_sampling_ratio/mean", "sampling/capped"),
    *("rewards/rarely/mean", "off_policy_ratio"),
}


# ------------------------------------------------------------------------------------------ rollout
def rollout_batch(model, s, consumed, ranks, again) -> Namespace:
    """The groups that a step trains on, rank by rank [(rank, serial, group)]; how many
    prompts were drawn, how many had equal rewards, and (spread, row) of each that was drawn."""
    args = s.args
    batch = Namespace(groups=[], drawn=0, equal=0, spreads=[])
    missing = args.prompts
    for _ in range(args.resample + 1):
        first = consumed + batch.drawn
        for i, row in enumerate(common.drawn(len(s.rows), args.seed, first, missing)):
            if i < len(again):
                row = again[i]
            group = rollouts.group(model, s, s.rows[row], first + i, args.group, args.temperature)
            totals = [rollouts.total(s, sample) for sample in group]
            if args.fork == "length_penalty":
                totals = with_penalty(args, group, totals)
            width = std(totals)
            batch.spreads.append((width, row))
            batch.equal += width <= 1e-8
            if width > 1e-8 or not args.resample:
                batch.groups.append(((first + i) % ranks, first + i, group))
        again = []
        batch.drawn += missing
        missing = args.prompts - len(batch.groups)
        if not missing:
            break
    batch.groups.sort(key=lambda group: group[0])
    return batch


# ---------------------------------------------------------------------------------------- advantage
def advantages(s, groups, totals) -> list[list[float]]:
    """groups: samples; totals: their rewards -> an advantage each, group by group."""
    if s.args.fork == "gdpo":
        sums = [gdpo(s, group) for group in groups]
        width = std([x for group in sums for x in group])
        return [[x / (width + 1e-4) for x in group] for group in sums]
    if s.args.fork == "median_baseline" and s.args.adv == "median":
        return [[median_baseline(r, group) for r in group] for group in totals]
    return plain.advantages(s.args.adv, totals)


def median_baseline(reward, group) -> float:
    return 0.0 if reward is None else reward - median(there(group))


def gdpo(s, group) -> list[float]:
    """The weighted sum of each reward's z-score in the group, 0 where it does not apply."""
    sums = [0.0] * len(group)
    for k, weight in enumerate(s.weights):
        scores = there(sample.rewards[k] for sample in group)
        for i, sample in enumerate(group):
            if sample.rewards[k] is not None:
                z = (sample.rewards[k] - sum(scores) / len(scores)) / (std(scores) + 1e-4)
                sums[i] += weight * z
    return sums


# -------------------------------------------------------------------------------------------- terms
def log_ratios(args, sample, logp_T) -> list:
    """log pi / pi_old at each sampled token."""
    at = positions(sample)
    each = plain.log_ratios(args.ratio, [logp_T[t] for t in at], [sample.old[t] for t in at])
    if args.fork == "two_sided_clip":
        each = [x.clamp(max=math.log(args.delta)) for x in each]
    return each


def corrections(args, sample, meter) -> list[float]:
    """Importance weight of each sampled token: trainer over engine, cut at the cap."""
    at = positions(sample)
    pairs = plain.corrections(args, [sample.old[t] for t in at], [sample.engine[t] for t in at])
    for _, ratio in pairs if args.correct != "none" else ():
        meter.add(1, **{"sampling/importance_sampling_ratio/mean": ratio})
        meter.add(1, **{"sampling/capped": ratio > args.correct_cap})
    return [weight for weight, _ in pairs]


def divisor(args, examples) -> int:
    lengths = [len(positions(e)) for e in examples]
    return plain.divisor(args.agg, lengths, args.max_new_tokens)


def loss_of(args, model, sample, meter, gap):
    """The summed loss of one sample. gap: of engine and trainer, or None after the first update."""
    given = sample.ids, args.temperature, sample.kept_ids
    with common.routed(model, sample.routes):
        logp_T, entropy_T = common.logp_and_entropy(model, *given)
    sample.passed = logp_T.tolist(), entropy_T.tolist()
    at = positions(sample)
    weight = 1 / len(at) if args.agg == "sequence" and at else 1.0
    correction = corrections(args, sample, meter)
    moved = sum(sample.engine[t] - logp_T[t].item() for t in at)
    loss = 0 * logp_T.sum()
    for t, log_ratio, factor in zip(at, log_ratios(args, sample, logp_T), correction):
        adv = sample.adv[t]
        if args.fork == "off_policy_mask":
            dropped = adv < 0 and moved / len(at) > args.off_policy_mask
            meter.add(1, off_policy_ratio=dropped)
            factor = 0.0 if dropped else factor
        policy_loss, clipped = plain.policy_loss(args, log_ratio, logp_T[t], adv)
        meter.add(1, **clipped)
        loss = loss + weight * factor * policy_loss
        if args.beta:
            kl_t = kl_estimate(args.kl, logp_T[t], sample.ref[t])
            meter.add(1, kl=kl_t)
            if args.fork != "kl_reward":
                loss = loss + args.beta * weight * kl_t
        if args.fork == "entropy_bonus":
            loss = loss - args.entropy_coef * weight * entropy_T[t]
        meter.add(1, entropy=entropy_T[t])
        if gap is not None:
            gap.append(abs(logp_T[t].item() - sample.engine[t]))
    return loss


def with_kl(args, sample, reward):
    """A reward less the KL of the whole sample: of a fork."""
    if reward is None:
        return None
    each = [kl_estimate(args.kl, sample.policy[t], sample.ref[t]) for t in positions(sample)]
    return reward - args.beta * sum(each)


def with_penalty(args, group, rewards):
    """The rewards of a group, those of right answers less what they are longer: of a fork."""
    lengths = [e.length for e, r in zip(group, rewards) if r is not None and r > 0]
    width = std_of_all(lengths) if lengths else 0.0
    found = []
    for e, r in zip(group, rewards):
        if r is not None and r > 0:
            excess = (e.length - sum(lengths) / len(lengths)) / (width + 1e-4)
            r = r * (1 - args.length_penalty / (1 + math.exp(-excess)))
        found.append(r)
    return found


def std_of_all(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))


def echo(args, model, minibatch, meter) -> int:
    """Backward pass of the cross-entropy of what the environment said: of a fork -> its tokens."""
    said = []
    for e in minibatch:
        start = len(e.prompt)
        said.append([start + i for i, drawn in enumerate(e.sampled) if not drawn])
    heard = sum(map(len, said))
    for e, at in zip(minibatch, said):
        logp_T, _ = common.logp_and_entropy(model, e.ids)
        for t in at:
            meter.add(1, echo=-logp_T[t])
        if at:
            (-args.echo_coef * sum(logp_T[t] for t in at) / heard).backward()
    return heard


# --------------------------------------------------------------------------------------------- twin
def twin(args):
    s = rollouts.setting(args)
    model = common.with_adapters(common.language_model(args.model), args)
    reference = common.language_model(args.model) if args.beta else None
    teacher = common.language_model(args.teacher) if args.fork == "distill" else None
    optimizer = common.AdamW(model, args.weight_decay)
    records = common.records(args.out)
    ranks = rollouts.num_ranks(records)
    rollouts.synced(model, s)
    yield {"step": 0, **rollouts.evaluate(model, s)}
    consumed, num_tokens, again = 0, 0, []
    for step in range(1, args.steps + 1):
        batch = rollout_batch(model, s, consumed, ranks, again)
        consumed += batch.drawn
        if args.fork == "curriculum":
            most = sorted(batch.spreads, reverse=True)
            again = [row for width, row in most if width > 1e-8][: args.prompts // 2]
        about, recorded = records[step]
        groups = [group for _, _, group in batch.groups]
        samples = [sample for group in groups for sample in group]
        owners = [rank for rank, _, group in batch.groups for _ in group]
        assert [line["rank"] for line in recorded] == owners
        for sample, line in zip(samples, recorded):
            rollouts.check_drawn(line, sample)
            sample.ids = sample.prompt + sample.new
            sample.engine, sample.kept_ids = line["engine_logp"], line.get("kept")

        # ---- log-probs
        for sample in samples:
            with torch.no_grad():
                given = sample.ids, args.temperature, sample.kept_ids
                logp_T, entropy_T = common.logp_and_entropy(model, *given)
                sample.routes = common.routes(model)
                sample.policy = spread(sample, [float(logp_T[t]) for t in positions(sample)])
                sample.entropy = spread(sample, [float(entropy_T[t]) for t in positions(sample)])
                if args.beta:
                    logp_T, _ = common.logp_and_entropy(reference, *given)
                    sample.ref = spread(sample, [float(logp_T[t]) for t in positions(sample)])
                if teacher is not None:
                    logp_T, _ = common.logp_and_entropy(teacher, *given)
                    of_new = [float(logp_T[t]) for t in positions(sample)]
                    sample.of_teacher = spread(sample, of_new)
            sample.old = sample.policy if args.old_logp == "trainer" else sample.engine

        # ---- advantage
        totals = [[rollouts.total(s, sample) for sample in group] for group in groups]
        learnt = totals
        if args.fork == "kl_reward":
            learnt = [
                [with_kl(args, sample, r) for sample, r in zip(*x)] for x in zip(groups, totals)
            ]
        if args.fork == "length_penalty":
            learnt = [with_penalty(args, *x) for x in zip(groups, totals)]
        adv = [x for group in advantages(s, groups, learnt) for x in group]
        if args.fork == "top_entropy":
            entropies = [sample.entropy[t] for sample in samples for t in positions(sample)]
            least = np.quantile(entropies, 1 - args.top_entropy)
        for sample, line, x in zip(samples, recorded, adv):
            columns = {"old_logp": sample.old, "adv": spread(sample, [x] * sample.length)}
            if args.beta:
                columns["ref_logp"] = sample.ref
            if args.fork == "kl_reward":
                columns["policy_logp"] = sample.policy
            if args.fork == "distill":
                columns["adv"] = [q - p for q, p in zip(sample.of_teacher, sample.old)]
                columns["teacher_logp"] = sample.of_teacher
            if args.fork == "top_entropy":
                kept = [a * (h >= least) for a, h in zip(columns["adv"], sample.entropy)]
                columns["adv"] = kept
            if args.fork == "overlong_mask" and sample.finish == "length":
                columns = {name: [0.0] * len(sample.ids) for name in columns}
                sample.trained = False
            sample.adv = columns["adv"]
            rollouts.check_recorded(s, line, sample, **columns)

        # ---- update
        meter, loss_sum, gaps, divisors = Means(), 0.0, [], []
        group_of = {serial: group for _, serial, group in batch.groups}
        for k, part in enumerate(np.array_split(sorted(group_of), args.minibatches)):
            minibatch = [sample for serial in part for sample in group_of[serial]]
            divisors.append(divisor(args, minibatch))
            trained = 0
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            if args.fork == "echo":
                trained += echo(args, model, minibatch, meter)
            for sample in minibatch:
                if args.beta or args.fork == "entropy_bonus" or any(sample.adv):
                    loss = loss_of(args, model, sample, meter, gaps if k == 0 else None)
                    (loss / divisors[-1]).backward()
                    loss_sum += loss.item() / divisors[-1]
                    trained += len(positions(sample))
            grad_norm = common.clip_gradients(model, args.grad_clip)
            update = (step - 1) * args.minibatches + k + 1
            lr = common.learning_rate(update, args.steps * args.minibatches, args.lr, args.warmup)
            if trained:
                optimizer.step(lr)
        assert about["divisors"] == divisors
        rollouts.check_passed(recorded, samples)

        # ---- log
        num_tokens += sum(sample.length for sample in samples)
        flat = [reward for group in totals for reward in group]
        first = [{"reward": r, "advantage": a} for r, a in zip(flat, adv)]
        if args.fork == "distill":
            first = [{"reward": r} for r in flat]
            for sample in samples:
                for t in positions(sample):
                    meter.add(1, divergence=sample.old[t] - sample.of_teacher[t])
        rollouts.check_samples(args, step, first)
        line = {
            "step": step,
            **meter.means(),
            **rollouts.rollout_metrics(s, samples),
            "reward": sum(there(flat)) / len(there(flat)),
            "reward_std": sum(map(std, totals)) / len(totals),
            "frac_reward_zero_std": batch.equal / batch.drawn,
            "groups": len(batch.groups),
            "prompts_drawn": batch.drawn,
            "loss": loss_sum / args.minibatches,
            "grad_norm": grad_norm,
            "lr": lr,
            "num_tokens": num_tokens,
        }
        line[f"{GAP}/max"] = max(gaps, default=0.0)
        if gaps:
            line[f"{GAP}/mean"] = sum(gaps) / len(gaps)
        rollouts.synced(model, s)
        if rollouts.is_due(args, step):
            line |= rollouts.evaluate(model, s)
        yield line
    return {"": common.of_module(model)}
