"""The twin of train_ppo.py and of its forks."""

import numpy as np
import torch

from nanopost import plain
from nanopost.plain import gae, kl_estimate, mean_and_std, returns, scale_of
from twins import common, rollouts
from twins.rollouts import GAP, Means, positions, spread

SCRIPT = "train_ppo.py"
PLAIN = (
    "--model {place}/model --data {place}/prompts.jsonl --eval_data {place}/prompts_held_out.jsonl "
    "--steps 3 --prompts 4 --group 2 --max_new_tokens 6 --temperature 0.8 --seed 5 --stop e 7 / "
    "--lr 4e-3 --warmup 0 --weight_decay 0.2 --grad_clip 0.6 --value_model {place}/rm "
)
TWO = "--reward {place}/reward.py:letters {place}/reward.py:scaled --reward_weights 0.7 -0.45 "
RUNS = {
    "ppo": PLAIN + TWO + "--eval_every 2 --tokens 70 --checkpointing full --kernels torch "
    "--engine_rows 5 --engine_tokens 200 --eval_rows 3 --clip 0.03 0.06 --beta 0.3 "
    "--value_lr 9e-3 --value_coef 0.7 --value_clip 0.05 --gamma 0.97 --lam 0.8 --eos_penalty 0.4 "
    "--score_scale --ppo_epochs 3",
    "warmed up": PLAIN + "--reward {place}/reward.py:scaled --whiten_rewards --value_warmup 1 "
    "--value_lr 1e-3 --minibatches 4 --ppo_epochs 1 --prompts 8 --group 1 --beta 0.5 --kl k3 "
    "--eos_penalty 1.5 --score_scale --gamma 0.9 --checkpointing selective",
    "head": PLAIN + TWO + "--value_model head --value_warmup 1 --kl k2 --beta 0.4 --lam 0.7 "
    "--whiten_rewards --max_logp_gap 5 --old_logp trainer --value_lr 2e-2 "
    "--top_k 60 --top_p 0.9 --min_p 0.1",
    "the engine's": PLAIN + TWO + "--value_model head --beta 0.1 --lam 1 --max_logp_gap 5 "
    "--top_p 0.8",
    "stale": PLAIN + TWO + "--max_staleness 1 --steps 4 --prompts 8 --group 1 --max_logp_gap 5 "
    "--max_new_tokens 9",
    "reward model": "--model {place}/model --data {place}/puzzles.jsonl --holdout 3 --steps 3 "
    "--rename puzzle=prompt --to_messages "
    "--reward model:{place}/rm {place}/reward.py:letters model:{place}/other_rm --prompts 2 "
    "--minibatches 1 --max_new_tokens 5 --lr 3e-3 --grad_clip 0 --value_clip 0.01",
    "other rows": "--model {place}/model --data {place}/puzzles.jsonl --holdout 3 "
    "--rename puzzle=prompt weight=factor --max_prompt 30 --chat_template {place}/chat.jinja "
    "--reward {place}/rewards.py:letters {place}/rewards.py:factors {place}/rewards.py:letters "
    "--steps 3 --prompts 4 --group 3 --max_new_tokens 5 --lr 3e-3 --warmup 0 --seed 2",
    "lora": PLAIN + TWO + "--lora 3 --lora_alpha 5 --rslora --beta 0.3 --value_warmup 1 --lr 2e-2 "
    "--value_lr 1e-2 --steps 3",
    "lora, head": PLAIN + TWO + "--lora 2 --lora_targets v_proj up_proj --beta 0.3 --lr 2e-2 "
    "--value_model head --weight_decay 0.3",
    "environment": PLAIN + rollouts.TALKS + "--max_turns 2 --beta 0.2 --lam 0.9 --eos_penalty 0.2",
    "experts": PLAIN + TWO + "--model {place}/experts --value_model head --beta 0.1",
    "fork adaptive_kl": PLAIN
    + TWO
    + "--kl_target 1.1 --beta 0.3 --value_warmup 1 --lr 8e-3 --steps 4",
    "fork kl_stop": PLAIN + TWO + "--kl_stop 0.1 --lr 1.5e-3",
    "fork ppo_kl_loss": PLAIN + TWO + "--beta 0.4 --kl k3 --eos_penalty 0.3",
}
METRICS = rollouts.METRICS | {
    *("objective/scores", "objective/kl", "objective/entropy", "objective/non_score_reward"),
    *("objective/rlhf_reward", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg"),
    *("policy/clipfrac_avg", "policy/entropy_avg", "val/ratio", "val/clipfrac_avg"),
    *("val/explained_variance", "val/num_eos_tokens", "grad_norm", "lr"),
    *("eval/accuracy/letters", "eval/accuracy/model-2", "rewards/model/mean"),
    *("eval/greedy/letters", "eval/greedy/model-2", "rewards/model-2/mean"),
    *("beta", "updates"),  # of forks
}


# ------------------------------------------------------------------------------------------ values
def actor_critic(args):
    """-> ModuleDict of policy and value, and whether the value model is one of its own."""
    model = torch.nn.ModuleDict(
        {"policy": common.with_adapters(common.language_model(args.model), args)}
    )
    folder = args.value_model
    if folder is None:
        named = [spec.removeprefix("model:") for spec in args.reward if spec.startswith("model:")]
        folder = named[0] if named else args.model
    if folder == "head":
        width = model.policy.config.hidden_size
        model["value"] = torch.nn.Linear(width, 1, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(model.value.weight)
    else:
        layers = len([name for name, _ in model.named_modules() if name.endswith(".lora_A")])
        model["value"] = common.with_adapters(common.scalar_model(folder), args, first=layers)
    return model, folder != "head"


def values(model, ids):
    """The value of the state before each token -> list of tensors; 0 for the first."""
    if isinstance(model.value, torch.nn.Linear):
        after_T = model.value(common.hidden(model.policy, ids))[:, 0]
    else:
        after_T = model.value.score(common.hidden(model.value, ids))[:, 0]
    return [after_T[0] * 0, *after_T[:-1]]


# --------------------------------------------------------------------------------------- advantages
def explained(samples) -> float:
    mean, width = mean_and_std([sample.monte_carlo for sample in samples])
    errors = [[g - v for g, v in zip(e.monte_carlo, e.values)] for e in samples]
    return 1 - (mean_and_std(errors)[1] / width) ** 2 if width > 1e-6 else 0.0


# --------------------------------------------------------------------------------------------- loss
def loss_of(args, model, sample, meter, gaps):
    """The summed loss of a sample. gaps: of engine and trainer, or None after the first update."""
    given = sample.ids, args.temperature, sample.kept_ids
    with common.routed(model.policy, sample.routes):
        logp_T, entropy_T = common.logp_and_entropy(model.policy, *given)
        value_T = values(model, sample.ids)
    if not hasattr(sample, "passed"):
        sample.passed = logp_T.tolist(), entropy_T.tolist()
    loss = 0.0
    for i, t in enumerate(positions(sample)):
        log_ratio = logp_T[t] - sample.old[i]
        ratio = log_ratio.exp()
        policy_loss, cut = plain.ppo_policy_loss(args.clip, log_ratio, sample.adv[i])
        target, old = sample.returns[i], sample.values[i]
        value_loss, value_cut = plain.value_loss(value_T[t], old, target, args.value_clip)
        loss = loss + policy_loss + args.value_coef * value_loss
        if args.fork == "ppo_kl_loss":
            loss = loss + args.beta * kl_estimate(args.kl, logp_T[t], sample.ref[i])
        meter.add(
            1,
            **{
                "loss/policy_avg": policy_loss,
                "loss/value_avg": value_loss,
                "policy/approxkl_avg": log_ratio**2 / 2,
                "policy/clipfrac_avg": cut,
                "policy/entropy_avg": entropy_T[t],
                "val/ratio": ratio,
                "val/clipfrac_avg": value_cut,
            },
        )
        if gaps is not None:
            gaps.append(abs(logp_T[t].item() - sample.engine[i]))
    return loss


# --------------------------------------------------------------------------------------------- twin
def twin(args):
    s = rollouts.setting(args)
    model, own = actor_critic(args)
    reference = common.language_model(args.model) if args.beta else None
    optimizer = common.AdamW(model, args.weight_decay)
    policy_trained = [p for p in model.policy.parameters() if p.requires_grad]
    value_rate = 1.0 if args.value_lr is None else args.value_lr / args.lr
    records = common.records(args.out)
    ranks = rollouts.num_ranks(records)
    rollouts.synced(model.policy, s)
    yield {"step": 0, **rollouts.evaluate(model.policy, s)}
    num_tokens, all_scores, beta = 0, [], args.beta
    for step in range(1, args.steps + 1):
        about, recorded = records[step]
        first = (step - 1) * args.prompts
        groups = []
        for i, row in enumerate(common.drawn(len(s.rows), args.seed, first, args.prompts)):
            groups.append(
                rollouts.group(
                    model.policy, s, s.rows[row], first + i, args.group, args.temperature
                )
            )
        samples = [e for rank in range(ranks) for group in groups[rank::ranks] for e in group]
        for sample, line in zip(samples, recorded, strict=True):
            rollouts.check_drawn(line, sample)

        # ---- log-probs, values, rewards of tokens: of the trained tokens alone
        for sample, line in zip(samples, recorded):
            sample.ids, sample.kept_ids = sample.prompt + sample.new, line.get("kept")
            sample.score = rollouts.total(s, sample)
            sample.trained = sample.score is not None
            at = positions(sample)
            sample.engine = [line["engine_logp"][t] for t in at]
            with torch.no_grad():
                given = sample.ids, args.temperature, sample.kept_ids
                logp_T, _ = common.logp_and_entropy(model.policy, *given)
                sample.routes = common.routes(model.policy)
                value_T = values(model, sample.ids)
                sample.policy = sample.ref = [logp_T[t].item() for t in at]
                if reference is not None:
                    logp_T, _ = common.logp_and_entropy(reference, *given)
                    sample.ref = [logp_T[t].item() for t in at]
            sample.old = sample.policy if args.old_logp == "trainer" else sample.engine
            sample.values = [value_T[t].item() for t in at]
            if sample.trained:
                sample.score -= args.eos_penalty * (sample.finish == "length")
            sample.rewards_T = [0.0] * len(at)
            if args.fork != "ppo_kl_loss":
                pairs = zip(sample.policy, sample.ref)
                sample.rewards_T = [-beta * kl_estimate(args.kl, a, b) for a, b in pairs]
            sample.kl_reward = sum(sample.rewards_T)
        scored = [sample for sample in samples if sample.trained]
        all_scores += [sample.score for sample in scored]
        scale = scale_of(all_scores) if args.score_scale else 1.0
        for sample in scored:
            sample.rewards_T[-1] += sample.score / scale
        if args.whiten_rewards:
            mean, width = mean_and_std([sample.rewards_T for sample in samples])
            for sample in samples:
                whitened = [(r - mean) / (width + 1e-8) + mean for r in sample.rewards_T]
                sample.rewards_T = whitened

        # ---- advantages
        for sample in samples:
            sample.adv = gae(sample.rewards_T, sample.values, args.gamma, args.lam)
            sample.returns = [a + v for a, v in zip(sample.adv, sample.values)]
            sample.monte_carlo = returns(sample.rewards_T, args.gamma)
        mean, width = mean_and_std([sample.adv for sample in samples])
        for sample, line in zip(samples, recorded):
            sample.adv = [(a - mean) / (width + 1e-8) for a in sample.adv]
            columns = {"value": sample.values, "adv": sample.adv, "ret": sample.returns}
            columns["old_logp"] = sample.old
            if reference is not None:
                columns |= {"policy_logp": sample.policy, "ref_logp": sample.ref}
            columns = {name: spread(sample, column) for name, column in columns.items()}
            rollouts.check_recorded(s, line, sample, **columns)
        shown = []
        for sample in samples:
            advantage = sample.monte_carlo[0] - sample.values[0] if sample.trained else 0.0
            shown.append({"score": sample.score, "advantage": advantage})
        rollouts.check_samples(args, step, shown)

        # ---- update
        for p in policy_trained:
            p.requires_grad_(step > args.value_warmup)
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup)
        meter, gaps, divisors, updates, grad_norm = Means(), [], [], 0, 0.0
        minibatches = []
        for epoch in range(args.ppo_epochs):
            order = np.random.default_rng((args.seed, step, epoch)).permutation(args.prompts)
            minibatches += np.array_split(order, args.minibatches)
        for k, minibatch in enumerate(minibatches):
            examples = [sample for i in minibatch for sample in groups[i]]
            examples = [sample for sample in examples if sample.trained]
            divisors.append(sum(sample.length for sample in examples))
            before = meter.sums["policy/approxkl_avg"][0]
            for sample in examples:
                loss = loss_of(args, model, sample, meter, gaps if k == 0 else None)
                (loss / divisors[-1]).backward()
            moved = meter.sums["policy/approxkl_avg"][0] - before
            if args.fork == "kl_stop" and moved / divisors[-1] > args.kl_stop:
                for p in model.parameters():
                    p.grad = None
                break
            grad_norm = common.clip_gradients(model, args.grad_clip)
            if examples:
                optimizer.step(lr, {"value": value_rate})
            updates += 1
        assert about["divisors"] == divisors
        if args.fork != "kl_stop":  # it may stop before an example's first update
            rollouts.check_passed(recorded, samples)

        # ---- log
        num_tokens += sum(sample.length for sample in samples)
        for sample in scored:
            meter.add(
                1,
                **{
                    "objective/scores": sample.score,
                    "objective/entropy": -sum(sample.old),
                    "objective/non_score_reward": sample.kl_reward,
                    "objective/rlhf_reward": sample.kl_reward + sample.score,
                },
            )
            if reference is not None:
                meter.add(1, **{"objective/kl": sum(sample.policy) - sum(sample.ref)})
        line = {
            "step": step,
            **meter.means(),
            **rollouts.rollout_metrics(s, samples),
            f"{GAP}/max": max(gaps, default=0.0),
            "val/explained_variance": explained(samples),
            "val/num_eos_tokens": sum(sample.finish == "stop" for sample in samples),
            "grad_norm": grad_norm,
            "lr": lr,
            "num_tokens": num_tokens,
        }
        if gaps:
            line[f"{GAP}/mean"] = sum(gaps) / len(gaps)
        if args.fork == "kl_stop":
            line["updates"] = updates
        if args.fork == "adaptive_kl":
            line["beta"] = beta
            if step > args.value_warmup:
                error = line["objective/kl"] / args.kl_target - 1
                beta *= 1 + 0.1 * min(0.2, max(-0.2, error))
        rollouts.synced(model.policy, s)
        if rollouts.is_due(args, step):
            line |= rollouts.evaluate(model.policy, s)
        yield line
    parts = {"": common.of_module(model.policy)}
    if own:
        parts["value"] = common.of_module(model.value)
    return parts
