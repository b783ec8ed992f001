"""The twin of train_distill.py: it samples the answers itself, and reads the whole distributions of
student and teacher at each of their tokens."""

from argparse import Namespace

import numpy as np
import torch

from nanopost import plain
from runs import toy
from twins import common, rollouts
from twins.rollouts import GAP, Means, positions

SCRIPT = "train_distill.py"
PLAIN = (
    "--model {place}/model --teacher {place}/teacher --data {place}/answers.jsonl "
    "--eval_data {place}/answers_held_out.jsonl --steps 3 --prompts 4 --max_new_tokens 6 "
    "--temperature 0.8 --seed 5 --lr 4e-3 --warmup 2 --weight_decay 0.2 --grad_clip 0.1 "
    "--eval_rows 2 --stop e 7 / "
)
RUNS = {
    "mixed": PLAIN + "--on_policy 0.6 --beta 0.3 --minibatches 2 --eval_every 2 "
    "--reward {place}/reward.py:letters {place}/reward.py:scaled --tokens 70 --checkpointing full "
    "--kernels torch --engine_rows 7 --engine_tokens 200",
    "forward, likeliest": PLAIN + "--beta 0 --teacher_top_k 5 --checkpointing selective",
    "given": "--model {place}/model --teacher {place}/teacher --data {place}/riddles.jsonl "
    "--holdout 3 --rename riddle=prompt solution=completion --to_messages --max_prompt 30 "
    "--chat_template {place}/chat.jinja --on_policy 0 --teacher_top_k 3 --steps 3 --prompts 4 "
    "--minibatches 2 --max_new_tokens 5 --lr 3e-3 --grad_clip 0 --seed 2",
    "mixed, likeliest": PLAIN + "--on_policy 0.4 --beta 0.7 --teacher_top_k 40 --max_logp_gap 5",
    "stale": PLAIN + "--steps 4 --max_staleness 2 --max_new_tokens 9",
    "environment": PLAIN + rollouts.TALKS + "--max_turns 2 --beta 0.5 --reward environment",
    "lora": PLAIN + "--lora 3 --lora_alpha 5 --rslora --lora_targets o_proj down_proj --beta 0.5 "
    "--lr 2e-2",
}
METRICS = {
    *("divergence", "entropy", "loss", "on_policy", "grad_norm", "lr", "epoch", "num_tokens"),
    *("eval/divergence", "eval/accuracy", "eval/accuracy/scaled"),
    *("eval/greedy", "eval/greedy/scaled"),
    *("completions/mean_length", "completions/min_length", "completions/max_length"),
    *("completions/clipped_ratio", "completions/duplicate_ratio"),
    "episodes/failed",
    *("staleness/mean", "staleness/max", f"{GAP}/mean", f"{GAP}/max"),
}


def answer_rows(count, first=0):
    """Prompts with answers of unequal lengths, some longer than the runs allow."""
    rows = common.prompt_rows(count, first)
    for i, row in enumerate(rows, first):
        row["completion"] = [common.message("assistant", row["answer"] + " yes" * (i % 3))]
    return rows


def riddle_rows(count):
    """The same as plain text, with other names of columns; some prompts are long."""
    found = []
    for i in range(count):
        riddle = f"{i}-{3 * i % 7}?" + " Really?" * (i % 4)
        found.append({"riddle": riddle, "solution": f"{i}" * (1 + i % 5)})
    return found


def write_more(place):
    """Add teacher/, deeper and wider than the student and with more tokens than its tokenizer has,
    answers.jsonl, answers_held_out.jsonl and riddles.jsonl to the tiny place."""
    larger = {"hidden_size": 40, "num_hidden_layers": 3, "vocab_size": 272}
    common.write_model(place / "teacher", seed=4, tie_word_embeddings=False, **larger)
    toy.write_rows(place / "answers.jsonl", answer_rows(9))
    toy.write_rows(place / "answers_held_out.jsonl", answer_rows(5, first=20))
    toy.write_rows(place / "riddles.jsonl", riddle_rows(14))
    rollouts.write_talk(place)


# ---------------------------------------------------------------------------------------- answers
def is_sampled(args, serial) -> bool:
    """Whether the student answers the prompt that is drawn as number `serial`."""
    return np.random.default_rng((args.seed, serial)).random() < args.on_policy


def given(s, row) -> Namespace:
    """The answer of a row, as a sample that nobody drew."""
    prompt, answer, template = row["prompt"], row["completion"], s.args.chat_template
    ids, mask = common.answered(s.tokenizer, prompt, answer, template)
    start = mask.index(True)
    new = ids[start : start + s.args.max_new_tokens]
    return Namespace(
        prompt=ids[:start],
        new=new,
        sampled=[True] * len(new),  # all of it trains
        trained=True,
        logp=[0.0] * len(new),
        versions=[-1] * len(new),
        finish="row",
    )


# ------------------------------------------------------------------------------------- divergence
def numbers(model, teacher, sample, args):
    """-> log-prob of each token, entropy and divergence from the teacher before it, three [T]."""
    ids = sample.prompt + sample.new
    logits_TV = common.logits(model, ids)
    with torch.no_grad():
        teacher_TV = common.logits(teacher, ids)
    logp_T, entropy_T = plain.logp_and_entropy(logits_TV, ids, args.temperature)
    vocabulary = logits_TV.shape[1]  # the teacher's may be larger
    divergence_T = [torch.zeros((), dtype=torch.float64)]
    for t in range(1, len(ids)):
        before = logits_TV[t - 1], teacher_TV[t - 1, :vocabulary]
        divergence_T.append(plain.divergence(args, *before))
    return logp_T, entropy_T, torch.stack(divergence_T)


@torch.no_grad()
def evaluated(model, teacher, s) -> dict:
    """Of held-out prompts, one sample each at temperature 1: the mean divergence over their tokens;
    and the mean rewards, of greedy answers too."""
    means, args = Means(), Namespace(**{**vars(s.args), "temperature": 1.0})
    for i, row in enumerate(s.held_out):
        (sample,) = rollouts.group(model, s, row, 2**32 + i, 1, 1.0)
        *_, divergence_T = numbers(model, teacher, sample, args)
        for t in positions(sample):
            means.add(1, **{"eval/divergence": divergence_T[t]})
    return means.means() | (rollouts.evaluate(model, s) if s.rewards else {})


# ------------------------------------------------------------------------------------------- twin
def drawn_metrics(s, drawn) -> dict:
    """completions/* and staleness/* of the samples of a step."""
    if not drawn:
        return {"staleness/max": 0}
    lengths = [sum(sample.sampled) for sample in drawn]
    cut_off = [sample.finish == "length" for sample in drawn]
    return {
        **rollouts.staleness(s, drawn),
        **rollouts.failed(s),
        "completions/mean_length": sum(lengths) / len(drawn),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(cut_off) / len(drawn),
        "completions/duplicate_ratio": 0.0,  # a prompt has one sample
    }


def twin(args):
    s = rollouts.setting(args)
    model = common.with_adapters(common.language_model(args.model), args)
    teacher = common.language_model(args.teacher[0])
    optimizer = common.AdamW(model, args.weight_decay)
    records = common.records(args.out)
    ranks = rollouts.num_ranks(records)
    rollouts.synced(model, s)
    yield {"step": 0, **evaluated(model, teacher, s)}
    num_tokens = 0
    for step in range(1, args.steps + 1):
        consumed = (step - 1) * args.prompts
        answers, drawn, stored = {}, [], {}
        for serial, i in enumerate(
            common.drawn(len(s.rows), args.seed, consumed, args.prompts), consumed
        ):
            if is_sampled(args, serial):
                (sample,) = rollouts.group(model, s, s.rows[i], serial, 1, args.temperature)
                drawn.append(sample)
            else:  # a rank may have a row twice in a step: both have the numbers of its first pass
                sample = stored.setdefault((serial % ranks, i), given(s, s.rows[i]))
            answers[serial] = sample
        about, recorded = records[step]
        owned = sorted(answers, key=lambda serial: (serial % ranks, serial))
        samples = [answers[serial] for serial in owned]
        assert [line["serial"] for line in recorded] == owned
        assert [line["rank"] for line in recorded] == [serial % ranks for serial in owned]
        for sample, line in zip(samples, recorded):
            assert line["ids"] == sample.prompt + sample.new
            assert line["finish"] == sample.finish
            rollouts.check_recorded(s, line, sample)
            sample.engine = line["engine_logp"]

        # ---- update
        meter, loss_sum, gaps, divisors = Means(), 0.0, [], []
        for k, part in enumerate(np.array_split(sorted(answers), args.minibatches)):
            minibatch = [answers[serial] for serial in part]
            divisors.append(sum(len(positions(sample)) for sample in minibatch))
            for sample in minibatch:
                found = numbers(model, teacher, sample, args)
                if not hasattr(sample, "passed"):
                    sample.passed = [x_T.tolist() for x_T in found]
                logp_T, entropy_T, divergence_T = found
                at = positions(sample)
                loss = sum(divergence_T[t] for t in at)
                (loss / divisors[-1]).backward()
                loss_sum += loss.item() / divisors[-1]
                meter.add(len(at), divergence=loss, entropy=sum(entropy_T[t] for t in at))
                if k == 0 and sample.finish != "row":
                    gaps += [abs(logp_T[t].item() - sample.engine[t]) for t in at]
            grad_norm = common.clip_gradients(model, args.grad_clip)
            update = (step - 1) * args.minibatches + k + 1
            lr = common.learning_rate(update, args.steps * args.minibatches, args.lr, args.warmup)
            optimizer.step(lr)
        assert about["divisors"] == divisors
        rollouts.check_passed(recorded, samples)

        # ---- log
        num_tokens += sum(divisors)
        line = {
            "step": step,
            **meter.means(),
            **drawn_metrics(s, drawn),
            "loss": loss_sum / args.minibatches,
            "on_policy": len(drawn) / args.prompts,
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": step * args.prompts / len(s.rows),
            "num_tokens": num_tokens,
            f"{GAP}/max": max(gaps, default=0.0),
        }
        if gaps:
            line[f"{GAP}/mean"] = sum(gaps) / len(gaps)
        rollouts.synced(model, s)
        if rollouts.is_due(args, step):
            line |= evaluated(model, teacher, s)
        yield line
    return {"": common.of_module(model)}
