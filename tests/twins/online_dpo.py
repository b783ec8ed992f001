"""The twin of train_online_dpo.py: it samples the answers itself, ranks them and pairs them."""

import math
import runpy
from argparse import Namespace

import torch

from nanopost import plain
from runs import toy
from twins import common, dpo, rollouts

SCRIPT = "train_online_dpo.py"
PLAIN = "--model {place}/model --data {place}/prompts.jsonl --eval_data "
PLAIN += "{place}/prompts_held_out.jsonl --max_new_tokens 6 --stop J 'k' --lr 4e-3 --warmup 0 "
RUNS = {
    "all": PLAIN + "--reward {place}/reward.py:letters {place}/reward.py:scaled model:{place}/rm "
    "--reward_weights 0.7 1.3 0.2 --judge {place}/judge.py:longer --reference_model {place}/near "
    "--loss sigmoid ipo robust exo --loss_weights 1 0.05 0.6 0.8 --smoothing 0.15 --beta 0.3 "
    "--eos_penalty 0.4 --temperature 0.7 --steps 3 --prompts 5 --group 3 --seed 3 "
    "--weight_decay 0.4 --grad_clip 0.5 --eval_every 2 --tokens 100 --engine_rows 4 "
    "--engine_tokens 200 --chat_template {place}/chat.jinja --checkpointing full --kernels torch",
    # Without near/, policy and reference would be equal in the first step, and rewards/ties would
    # be a matter of rounding.
    "judge": "--model {place}/model --data {place}/puzzled.jsonl --rename puzzle=prompt "
    "--holdout 4 --max_prompt 20 --judge {place}/judge.py:longer --loss sigmoid_norm hinge "
    "discopop nca sppo apo_zero apo_down --eos_penalty 0.3 --max_new_tokens 5 --steps 3 "
    "--prompts 3 --lr 2e-3 --warmup 1 --to_messages --reference_model {place}/near "
    "--checkpointing selective "
    "--top_k 60 --top_p 0.9 --min_p 0.1",
    # Rewards are seldom unequal: there are steps with few pairs, and ranks with none.
    "without_reference": PLAIN + "--reward {place}/judge.py:rarely --loss simpo cpo sft "
    "--eval_rows 4 --gamma 0.9 --beta 0.4 --eos_penalty 0 --steps 3 --prompts 3 --group 2",
    "stale": PLAIN + "--reward {place}/reward.py:letters --loss sigmoid --steps 4 --prompts 3 "
    "--max_staleness 1 --max_new_tokens 9 --reference_model {place}/near",
    "lora": PLAIN + "--reward {place}/reward.py:letters --steps 3 --prompts 3 --reference_model "
    "{place}/near --lora 3 --lora_alpha 5 --rslora --lora_targets q_proj v_proj --lr 2e-2",
    "environment": PLAIN + rollouts.TALKS + "--max_turns 2 --loss sigmoid --steps 3 --prompts 3 "
    "--reference_model {place}/near",
    "orpo": PLAIN + "--reward {place}/reward.py:letters --loss orpo --steps 3 --prompts 2",
}
METRICS = {
    *dpo.PAIR_METRICS,
    *("eval/accuracy", "eval/greedy", "eval/kl", "reward", "ties", "pairs", "entropy"),
    *("completions/mean_length", "completions/min_length", "completions/max_length"),
    *("completions/clipped_ratio", "completions/duplicate_ratio", "completions/unrewarded"),
    *("staleness/mean", "staleness/max", "episodes/failed"),
    *("grad_norm", "lr", "epoch", "num_tokens"),
}
JUDGE = '''
def longer(prompts, pairs):
    """The text with more letters wins, and the second one if neither has any; else it is a tie."""
    verdicts = []
    for prompt, texts in zip(prompts, pairs):
        first, second = [sum(c.isalpha() for c in text) for text in texts]
        verdict = None if first == second else int(second > first)
        verdicts.append(1 if first == second == 0 else verdict)
    return verdicts


def rarely(completions, **columns):
    """Equal for most answers, and does not apply to others."""
    sums = [sum(map(ord, text[0]["content"])) for text in completions]
    return [None if x % 3 == 0 else float(x % 4 == 0) for x in sums]
'''


def write_more(place):
    """Add judge.py, puzzled.jsonl, near/ and what write_talk does to the tiny place."""
    dpo.write_near(place)
    rollouts.write_talk(place)
    (place / "judge.py").write_text(JUDGE)
    rows = common.prompt_rows(14)
    rows = [{"puzzle": row["prompt"] if i % 3 else f"{i}, "} for i, row in enumerate(rows)]
    toy.write_rows(place / "puzzled.jsonl", rows)


# ----------------------------------------------------------------------------------------- ranking
def wins(judge, s, row, texts):
    """How many others of its group each text beats. The judge sees a later text first."""
    found = [0] * len(texts)
    for i in range(len(texts)):
        for j in range(i):
            (verdict,) = judge([row["prompt"]], [(texts[i], texts[j])])
            if verdict is not None:
                found[(i, j)[verdict]] += 1
    return found


def ranked(judge, s, row, samples):
    """Give each sample of a group its reward, less the penalty if it was cut off; None if there are
    rewards and none applies."""
    texts = [rollouts.text_of(s, sample.new) for sample in samples]
    won = wins(judge, s, row, texts) if judge else [0] * len(samples)
    for sample, w in zip(samples, won):
        sample.reward = rollouts.total(s, sample) if s.rewards else 0.0
        if sample.reward is not None:
            sample.reward += w - s.args.eos_penalty * (sample.finish == "length")


def best_and_worst(samples):
    """-> (chosen, rejected), the first of equals; None if they are equal."""
    samples = [sample for sample in samples if sample.reward is not None]
    if not samples:
        return None
    best = max(samples, key=lambda sample: sample.reward)
    worst = min(samples, key=lambda sample: sample.reward)
    if best.reward == worst.reward or best.new == worst.new:
        return None
    return [(x.prompt + x.new, len(x.prompt), x.sampled) for x in (best, worst)]


# --------------------------------------------------------------------------------------------- twin
@torch.no_grad()
def evaluated(model, reference, s):
    """Mean rewards of held-out answers, sampled and greedy, and the KL by the sampled ones. Neither
    the judge nor the penalty counts."""
    if not s.rewards:
        return {}
    found = {}
    for name, temperature in [("accuracy", 1.0), ("greedy", 0.0)]:
        samples = []
        for i, row in enumerate(s.held_out):
            samples += rollouts.group(model, s, row, 2**32 + i, 1, temperature, whole=True)
        totals = [rollouts.total(s, x) for x in samples]
        totals = [x for x in totals if x is not None]
        if totals:
            found[f"eval/{name}"] = sum(totals) / len(totals)
        if name == "accuracy" and reference is not None:
            kl = 0.0
            for x in samples:
                for m, sign in [(model, 1), (reference, -1)]:
                    logp_T, _ = common.logp_and_entropy(m, x.prompt + x.new)
                    kl += sign * logp_T[rollouts.positions(x)].sum().item()
            found["eval/kl"] = kl / len(samples)
    return found


def check_recorded(recorded, about, groups, first, prompt_too):
    """AssertionError unless a step's record tells of these groups, in the order of one process
    -> their samples, rank by rank. first: the serial of the first group."""
    found_about, found = recorded
    assert {name: found_about[name] for name in about} == about
    ranks = 1 + max(line["rank"] for line in found)
    owned = sorted(range(len(groups)), key=lambda i: (first + i) % ranks)
    ordered = [sample for i in owned for sample in groups[i]]
    for line, sample in zip(found, ordered, strict=True):
        assert line["ids"] == sample.prompt + sample.new
        drawn = [False] * len(sample.prompt) + sample.sampled
        whole = prompt_too and bool(line["minibatch"])  # of a pair
        assert line["mask"] == [int(x or whole) for x in drawn]
        assert line["finish"] == sample.finish
        versions = [0] * len(sample.prompt) + sample.versions
        assert line["version"] == [v if x else -1 for v, x in zip(versions, drawn)]
        assert "kept" not in line  # the loss is over the whole distribution
        logp = [0.0] * len(sample.prompt) + sample.logp
        assert max(abs(a - b) for a, b in zip(line["engine_logp"], logp)) < rollouts.RECORDED
        if sample.reward is None:
            assert math.isnan(line["reward"])
        else:
            assert abs(line["reward"] - sample.reward) < rollouts.RECORDED
    return ordered


def twin(args):
    s = rollouts.setting(args)
    judge = None
    if args.judge:
        path, name = args.judge.split(".py:")
        judge = runpy.run_path(f"{path}.py")[name]
    # The script has no other divergence than the reverse KL, and its twin uses that of DPO.
    loss_args = Namespace(**vars(args), divergence="reverse_kl")
    model = common.with_adapters(common.language_model(args.model), args)
    reference = None
    if set(args.loss) - plain.WITHOUT_REFERENCE:
        reference = common.language_model(args.reference_model or args.model)
    optimizer = common.AdamW(model, args.weight_decay)
    records = common.records(args.out)

    rollouts.synced(model, s)
    yield {"step": 0, **evaluated(model, reference, s)}
    tokens = 0
    for step in range(1, args.steps + 1):
        consumed = (step - 1) * args.prompts
        drawn = common.drawn(len(s.rows), args.seed, consumed, args.prompts)
        groups = []
        for serial, i in enumerate(drawn, consumed):
            row = s.rows[i]
            samples = rollouts.group(model, s, row, serial, args.group, args.temperature)
            ranked(judge, s, row, samples)
            groups.append(samples)
        pairs = [pair for pair in map(best_and_worst, groups) if pair]
        prompt_too = "orpo" in args.loss
        sides = [
            [
                dpo.numbers(model, reference, ids, start, prompt_too=prompt_too, sampled=sampled)
                for ids, start, sampled in pair
            ]
            for pair in pairs
        ]
        nll_tokens = sum(chosen.targets for chosen, _ in sides) / max(1, len(pairs))
        about = {"divisor": len(pairs), "nll_tokens": nll_tokens}
        ordered = check_recorded(
            records[step], about, groups, first=consumed, prompt_too=prompt_too
        )
        each = []
        for pair in sides:
            loss = plain.pair_loss(*pair, nll_tokens, loss_args)
            (loss / len(pairs)).backward()
            each.append(dpo.pair_metrics(*pair, loss, args))
        grad_norm = common.clip_gradients(model, args.grad_clip)
        lr = common.learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.step(lr)  # nothing without a pair
        samples = [x for group in groups for x in group]
        every_side = [x for pair in sides for x in pair]
        tokens += sum(x.tokens for x in every_side)
        rewards = [x.reward for x in samples if x.reward is not None]
        first = [{} if x.reward is None else {"reward": x.reward} for x in ordered[: args.group]]
        rollouts.check_samples(args, step, first)
        lengths = [x.length for x in samples]
        line = {
            "step": step,
            **dpo.means(each),
            "completions/unrewarded": 1 - len(rewards) / len(samples),
            "ties": 1 - len(pairs) / len(groups),
            "pairs": len(pairs),
            **rollouts.staleness(s, samples),
            **rollouts.failed(s),
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": sum(x.finish == "length" for x in samples) / len(samples),
            "completions/duplicate_ratio": rollouts.duplicates(s, samples) / len(samples),
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": step * args.prompts / len(s.rows),
            "num_tokens": tokens,
        }
        if rewards:
            line["reward"] = sum(rewards) / len(rewards)
        if every_side:
            line["entropy"] = sum(x.entropy for x in every_side) / sum(
                x.targets for x in every_side
            )
        rollouts.synced(model, s)
        if dpo.is_due(step, args.eval_every, args.steps):
            line |= evaluated(model, reference, s)
        yield line
    return {"": common.of_module(model)}
