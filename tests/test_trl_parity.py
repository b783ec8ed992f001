"""The end-to-end oracle: the same weights and rows through train_sft.py and TRL's SFTTrainer; the
same rollouts through our packed model and losses, and through TRL's GRPOTrainer with transformers'
padded model.

Shapes: B rollouts, T tokens of the longest, P prompts, G samples per prompt.
"""

import json

import numpy as np
import pytest
import torch
from scripts import ENVIRONMENT, ROOT, metrics, run

trl = pytest.importorskip("trl")
pytest.importorskip("accelerate")
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, Qwen3ForCausalLM  # noqa: E402

from bench import assets, common  # noqa: E402
from bench.common import flags  # noqa: E402
from bench.reward import length_modulo_7  # noqa: E402
from nanopost import hf, losses, optim, packing  # noqa: E402
from nanopost.batch import Example, batch_of  # noqa: E402
from nanopost.engine import Engine, Sampling, prompt_seed  # noqa: E402
from nanopost.teacher import Teacher  # noqa: E402
from nanopost.tokenizer import Tokenizer  # noqa: E402

SMALL = dict(
    vocab=400,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=96,
    scale=0.1,
    characters=200_000,
    stop_ids=tuple(range(300, 330)),
)
STEPS, ROWS, SEED, TEMPERATURE, NEW, GROUP = 10, 8, 3, 0.9, 24, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a small random Qwen3 with a tokenizer, written by transformers."""
    folder = tmp_path_factory.mktemp("parity")
    assets.make_model(folder, **SMALL)
    return folder


# --------------------------------------------------------------------------------------------- SFT
@pytest.fixture(scope="module")
def rows(folder):
    rows = assets.chat_rows(AutoTokenizer.from_pretrained(folder), 60, longest=120)
    assets.write_rows(folder / "rows.jsonl", rows)
    return rows


SFT = dict(steps=STEPS, lr=2e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def trl_sft(folder, rows):
    """What TRL logs of each step, padded, in the order in which train_sft.py takes the rows: more
    than one epoch."""
    order = packing.take(len(rows), SEED, 0, STEPS * ROWS)
    assets.write_rows(folder / "ordered.jsonl", [rows[i] for i in order])
    arguments = flags(model=folder, data=folder / "ordered.jsonl", batch=ROWS, **SFT)
    done = common.run(
        ["-m", "bench.trl_sft", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tokens", [4096, 300], ids="micro-batches of {} tokens".format)
def test_ten_steps_of_train_sft_are_those_of_trl(folder, rows, trl_sft, tmp_path, tokens):
    """At the same rates, which fall linearly: whatever the micro-batches."""
    own = flags(
        model=folder,
        data=folder / "rows.jsonl",
        eval_data=folder / "rows.jsonl",
        out=tmp_path / "sft",
        rows=ROWS,
        seed=SEED,
        tokens=tokens,
        warmup=0,
        eval_every=100,
    )
    run("train_sft.py", *own, *flags(**SFT))
    ours = metrics(tmp_path / "sft")[1:]
    assert [m["num_tokens"] for m in ours] == np.cumsum(trl_sft["tokens"]).tolist()
    assert [m["lr"] for m in ours] == pytest.approx(trl_sft["learning_rate"], rel=1e-12)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [m[name] for m in ours], trl_sft[name], atol=1e-3, rtol=0, err_msg=name
        )
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.3


# -------------------------------------------------------------------------------------------- GRPO
def trainer_of(folder, tmp_path, batch, accumulate, **settings):
    """A real GRPOTrainer; `accumulate` micro-batches of `batch` completions make a step."""
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        num_generations=GROUP,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_completion_length=NEW,
        temperature=TEMPERATURE,
        use_bias_correction_kl=False,
        **settings,
    )
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=length_modulo_7,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.current_gradient_accumulation_steps = accumulate  # set by train(), which is not called
    trainer.model.train()
    return trainer


def padded(values, side, dtype=torch.long):
    """Lists of unequal lengths -> [B, T], zeros on that side."""
    longest = max(map(len, values))
    lines = []
    for value in values:
        pad = [0] * (longest - len(value))
        lines.append(pad + list(value) if side == "left" else list(value) + pad)
    return torch.tensor(lines, dtype=dtype)


def trl_inputs(prompts, completions, advantages, **columns):
    """Rollouts as TRL lays them out: prompts padded on the left, completions and their columns on
    the right."""
    columns = {k: padded(v, "right", torch.float32) for k, v in columns.items()}
    return {
        "prompt_ids": padded(prompts, "left"),
        "prompt_mask": padded([[1] * len(p) for p in prompts], "left"),
        "completion_ids": padded(completions, "right"),
        "completion_mask": padded([[1] * len(c) for c in completions], "right"),
        "advantages": torch.tensor(advantages, dtype=torch.float32),
        **columns,
    }


def trl_step(trainer, inputs, batch):
    """Accumulate the gradients of one optimizer step -> its loss as TRL adds it up."""
    total, tokens = 0.0, inputs["completion_mask"].sum()
    for i in range(0, len(inputs["prompt_ids"]), batch):
        part = {k: v[i : i + batch] for k, v in inputs.items()}
        loss = trainer._compute_loss(trainer.model, {**part, "num_items_in_batch": tokens})
        loss.backward()
        total += float(loss.detach())
    return total


def our_gradient(model, prompts, completions, advantages, tokens, agg, beta, **columns):
    """The update of train_grpo.py on fixed rollouts -> name: gradient."""
    examples = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        mask = [False] * len(prompt) + [True] * len(completion)
        e = Example(prompt + completion, mask)
        e.columns["adv"] = advantages[i] * e.mask
        for name, values in columns.items():
            e.columns[name] = np.array([0.0] * len(prompt) + values[i])
        examples.append(e)
    divisor = losses.divisor(agg, sum(map(len, completions)), len(completions), NEW)
    for part in packing.micro_batches([len(e) for e in examples], tokens):
        batch = batch_of([examples[i] for i in part])
        logp_N, _ = model(batch, TEMPERATURE)
        weight_N = losses.token_weights(batch.sequences, agg)
        log_ratio_N = losses.log_ratio(
            logp_N, batch["old_per_token_logps"], batch.sequences, "token"
        )
        loss, _ = losses.policy_loss_clip(log_ratio_N, logp_N, batch["adv"], weight_N, 0.2, 0.28)
        if beta:
            kl_N = losses.kl_k3(logp_N, batch["ref_per_token_logps"])
            loss = loss + beta * (weight_N * kl_N).sum()
        (loss / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def rollouts():
    """Eight random ones of unequal lengths, with random advantages."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 400, n).tolist() for n in (5, 9, 2, 14, 5, 1, 7, 3)]
    completions = [draw.integers(3, 400, n).tolist() for n in (24, 3, 11, 1, 24, 17, 6, 9)]
    return dict(prompts=prompts, completions=completions, advantages=draw.normal(size=8).tolist())


@pytest.fixture(scope="module")
def columns(folder, rollouts):
    """Log-probs of an old policy and of a reference: those of the policy with noise, so that some
    are clipped."""
    model, draw = hf.load_model(folder), np.random.default_rng(1)
    logps = []
    for prompt, completion in zip(rollouts["prompts"], rollouts["completions"]):
        ids = prompt + completion
        batch = batch_of([Example(ids, np.arange(len(ids)) >= len(prompt))])
        with torch.no_grad():
            logp_N, _ = model(batch, TEMPERATURE)
        logps.append(batch.split(logp_N)[0][len(prompt) :])
    columns = {}
    for name, noise in (("old_per_token_logps", 0.3), ("ref_per_token_logps", 0.5)):
        noisy = [logp + draw.normal(size=len(logp)) * noise for logp in logps]
        columns[name] = [logp.tolist() for logp in noisy]
    return columns


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    "loss_type, agg", [("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")]
)
def test_the_gradient_of_a_grpo_step_is_that_of_trl(
    folder, rollouts, columns, tmp_path, loss_type, agg, beta
):
    """Ours packed into three micro-batches by length, TRL's padded into two of four."""
    trainer = trainer_of(
        folder, tmp_path, 4, 2, loss_type=loss_type, beta=beta, epsilon=0.2, epsilon_high=0.28
    )
    trl_step(trainer, trl_inputs(**rollouts, **columns), 4)
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    ours = our_gradient(hf.load_model(folder), **rollouts, tokens=60, agg=agg, beta=beta, **columns)
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    gap = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    assert 0 < gap < 1e-5 * largest


def test_two_optimizer_steps_of_train_grpo_are_those_of_trl(folder, tmp_path):
    """The script's rollouts, sampled again here, its advantages, minibatches, KL, AdamW and rates:
    loss and gradient norm."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = assets.prompt_rows(tokenizer, 6)
    assets.write_rows(tmp_path / "prompts.jsonl", rows)
    peak, seed = 3e-3, 4  # a seed with few gradients that are 0 but for rounding: see the end
    arguments = flags(
        model=folder,
        data=tmp_path / "prompts.jsonl",
        eval_data=tmp_path / "prompts.jsonl",
        out=tmp_path / "grpo",
        steps=1,
        prompts=4,
        group=GROUP,
        minibatches=2,
        max_new_tokens=NEW,
        temperature=TEMPERATURE,
        seed=seed,
        lr=peak,
        warmup=0,
        agg="sequence",
        beta=0.04,
        tokens=300,
        reward=ROOT / "bench/reward.py:length_modulo_7",
    )
    run("train_grpo.py", *arguments)
    ours = metrics(tmp_path / "grpo")[-1]

    prompts = []
    for i in packing.take(len(rows), seed, 0, 4):
        ids = tokenizer.apply_chat_template(
            rows[i]["prompt"], add_generation_prompt=True, return_dict=False
        )
        prompts.append(ids)
    engine = Engine.of(hf.load_model(folder), Tokenizer.load(folder))
    seeds = [prompt_seed(seed, serial) for serial in range(4)]
    groups = engine.generate(prompts, GROUP, Sampling(NEW, TEMPERATURE), seeds)
    rollouts = [r for group in groups for r in group]
    assert len({len(r.ids) for r in rollouts}) > 3
    # Unlike TRL's, our rewards read special tokens too, but for the one that ends an answer.
    stops = Tokenizer.load(folder).stop_ids
    texts = [tokenizer.decode([*r.ids[:-1], *{r.ids[-1]} - stops]) for r in rollouts]
    reward_PG = torch.tensor(length_modulo_7(texts)).view(4, GROUP)
    adv_PG = (reward_PG - reward_PG.mean(1, keepdim=True)) / (reward_PG.std(1, keepdim=True) + 1e-4)
    assert ours["reward"] == pytest.approx(float(reward_PG.mean()))

    # Before the first update the reference is the old policy: it has the same log-probs.
    inputs = trl_inputs(
        [r.prompt for r in rollouts],
        [r.ids for r in rollouts],
        adv_PG.flatten().tolist(),
        old_per_token_logps=[r.logp for r in rollouts],
        ref_per_token_logps=[r.logp for r in rollouts],
    )
    trainer = trainer_of(folder, tmp_path, 8, 1, loss_type="grpo", beta=0.04)
    optimizer = torch.optim.AdamW(
        trainer.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0
    )
    loss, norms = 0.0, []
    for i, rate in ((0, peak), (8, peak / 2)):
        optim.set_learning_rate(optimizer, rate)
        loss += trl_step(trainer, {k: v[i : i + 8] for k, v in inputs.items()}, 8) / 2
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    assert ours["lr"] == peak / 2
    # the second step is far from the first
    assert ours["clip_ratio/region_mean"] > 0.01 and ours["kl"] > 1e-3
    assert ours["loss"] == pytest.approx(loss, abs=1e-4)
    assert ours["grad_norm"] == pytest.approx(norms[1], rel=1e-3)
    start = all_weights(hf.load_model(folder))
    ours, theirs = all_weights(hf.load_model(tmp_path / "grpo")), all_weights(trainer.model)
    # Not each weight: where a gradient is 0 but for rounding, Adam moves by its sign.
    assert (ours - theirs).norm() < 5e-4 * (theirs - start).norm()


def all_weights(model):
    return torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])


# ------------------------------------------------------------------------------------ distillation
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradient_of_a_batch_are_those_of_trls_gkd(tmp_path, alone, beta):
    """A student and a wider teacher of one vocabulary; rows of uneven length, padded for TRL and
    packed for us, where two of them share their prompt."""
    from trl.experimental.gkd import GKDTrainer

    for name, changes in (("student", {}), ("teacher", {"width": 96, "scale": 0.15})):
        assets.make_model(tmp_path / name, **{**SMALL, **changes})
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(400, (9,), generator=generator).tolist()
    examples = []
    for start, new in ((prompt, 7), (prompt, 12), (prompt[:4], 3)):
        ids = [*start, *torch.randint(400, (new,), generator=generator).tolist()]
        examples.append(Example(ids, np.arange(len(ids)) >= len(start)))

    student, teacher = (hf.load_model(tmp_path / name) for name in ("student", "teacher"))
    judge = Teacher(teacher, 400, torch.float32, beta, top_k=0)
    batch = batch_of(examples)
    assert batch.prefixes is not None
    *_, divergence_N = student(batch, head=judge(batch, TEMPERATURE))
    (divergence_N.sum() / batch.num_targets).backward()

    longest = max(map(len, examples))
    ids_BT, label_BT = torch.zeros(2, len(examples), longest, dtype=torch.long)
    label_BT -= 100
    for i, e in enumerate(examples):
        ids_BT[i, : len(e)] = torch.from_numpy(e.ids)
        label_BT[i, : len(e)] = torch.from_numpy(np.where(e.mask, e.ids, -100))
    theirs, of_teacher = (
        Qwen3ForCausalLM.from_pretrained(tmp_path / name) for name in ("student", "teacher")
    )
    with torch.no_grad():
        teacher_BTV = of_teacher(ids_BT).logits
    loss = GKDTrainer.generalized_jsd_loss(
        theirs(ids_BT).logits[:, :-1],
        teacher_BTV[:, :-1],
        label_BT[:, 1:],
        beta=beta,
        temperature=TEMPERATURE,
    )
    loss.backward()
    found = divergence_N.sum().item() / batch.num_targets
    assert loss > 0.01 and abs(found - loss.item()) < 1e-5 * loss.item()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in student.named_parameters():
        largest = grads[name].abs().max()
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5 * largest)
