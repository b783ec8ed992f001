"""What replay.py reads of a recorded run, and the models of its checkpoints in float64.

A sequence goes through a model alone, not packed, and its log-probs are taken from all logits: of
the library this shares the decoder (model.py) and the reading of files, and nothing else.

Shapes: T tokens of one sequence, D width, V vocabulary.
"""

import copy
import hashlib
import json
import re
from argparse import Namespace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from nanopost import (
    InputError,
    checkpoint,
    hf,
    lora,
    optim,
    packing,
    pairs,
    plain,
    recording,
    rows,
)
from nanopost.moe import Routes
from nanopost.packing import order
from nanopost.run import starts_of
from nanopost.tokenizer import Tokenizer

KINDS = "sft", "dpo", "grpo", "ppo", "online_dpo", "kto", "rm", "distill"
FORMS = {"sft": rows.sft, "dpo": rows.pair, "kto": rows.unpaired, "rm": rows.pair}
FORMS |= {"distill": rows.answered}
HELD = 3  # models in memory


class Step(Namespace):
    """A step's record: number, about (its first line), examples (see Recorded.step), flags, those
    in force at that step, and metrics, its line of metrics.jsonl."""


class Recorded:
    """The folder of a run with --record."""

    def __init__(self, out):
        """InputError unless it has records."""
        self.out = Path(out)
        self.starts = starts_of(out)
        if not self.starts:
            hint = hf.inside(out, "run.json") or "give the --out of a run"
            raise InputError(f"{out} is no run's folder: it has no run.json; {hint}.")
        command = self.starts[-1]["command"]
        self.kind = next(iter(re.findall(r"train_(\w+)\.py", command)), "")
        if self.kind not in KINDS:
            raise InputError(f"{out} is of no script that replay knows: {command[:100]}.")
        paths = (self.out / "records").glob("[0-9]*.jsonl")
        self.paths = {int(path.stem): path for path in sorted(paths)}
        if not self.paths:
            raise InputError(f"{out} has no records: train with --record, and --save_every 1.")
        self.saved = {checkpoint.step_of(path): path for path in checkpoint.complete(out)}
        self.models = {}

    # ------------------------------------------------------------------------------------ records
    def flags(self, step: int) -> Namespace:
        """Those of the start, or of the resume, that the step belongs to."""
        fitting = [start for start in self.starts if (start["resumed_at"] or 0) < step]
        return Namespace(**(fitting or self.starts)[-1]["args"])

    @cached_property
    def metrics(self) -> dict[int, dict]:
        text = (self.out / "metrics.jsonl").read_text(encoding="utf-8")
        return {line["step"]: line for line in map(json.loads, text.splitlines())}

    def step(self, number: int) -> Step:
        """Each example is a Namespace of its line. at: its trained tokens that something predicts.
        rewards: None where one does not apply."""
        about, *lines = map(json.loads, self.paths[number].read_text(encoding="utf-8").splitlines())
        if "updates" not in about:
            raise InputError(f"{self.paths[number]} was written before there was a replay.")
        examples = []
        for i, line in enumerate(lines):
            e = Namespace(**{"kept": None, "routes": None, "logp": None, **line}, index=i)
            if e.routes is not None:
                e.routes = torch.tensor(recording.decoded(e.routes))
            e.at = [t for t in range(1, len(e.ids)) if e.mask[t]]
            if "rewards" in line:
                e.rewards = [None if x != x else x for x in e.rewards]
            examples.append(e)
        return Step(
            number=number,
            about=about,
            examples=examples,
            flags=self.flags(number),
            metrics=self.metrics.get(number, {}),
        )

    def answers(self, step: int) -> dict[int, dict]:
        """Seed -> the group that the engine answered, of those that a step took."""
        found, begins = {}, f'{{"step": {step}, '
        for path in (self.out / "records").glob("rollouts-*.jsonl"):
            with open(path, encoding="utf-8") as file:
                for line in file:
                    if line.startswith(begins):
                        group = json.loads(line)
                        found[group["seed"]] = group
        return found

    # ----------------------------------------------------------------------------------- the data
    @cached_property
    def changed(self) -> str:
        """What has changed since of the files that the run read, or ""."""
        for path, was in self.starts[-1]["hashes"].items():
            if Path(path).is_dir():  # of a model: the log-probs under it tell
                continue
            if not Path(path).is_file():
                return f"{path} is no longer there"
            with open(path, "rb") as file:
                now = hashlib.file_digest(file, "sha256").hexdigest()
            if now != was:
                return f"{path} has changed since"
        return ""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        flags = self.flags(1)
        return Tokenizer.load(flags.model, flags.chat_template)

    @cached_property
    def rows(self) -> list:
        """What the run drew from, in its order: (row, ids, mask) of SFT, two of them of pairs, the
        rows of prompts with their prompt_ids."""
        f, tokenizer = self.flags(1), self.tokenizer
        form = FORMS.get(self.kind, rows.prompt)
        given, held_out = rows.load(f.data, f.eval_data, f.holdout, f.rename, form, f.to_messages)
        positions = hf.read_config(f.model).max_positions
        if self.kind == "sft":
            limit = min(f.max_length or f.tokens, f.tokens, positions)
            return self._pieces(given, limit)
        if self.kind == "dpo":
            limit = min(f.max_length or f.tokens // 2, positions)
            return self._pairs(given, limit)
        sides = 2 if self.kind == "online_dpo" else 1
        parts = given, held_out[: f.eval_rows]
        room = f.max_prompt, f.max_new_tokens, f.tokens, positions, sides
        (given, _), _ = tokenizer.with_prompts(parts, *room)
        return given

    def completed(self, serial: int) -> tuple[list[int], list[bool]]:
        """Ids and mask of the prompt that was drawn as number `serial`, with its row's answer."""
        row = self.rows[self.row_of(serial)]
        prompt, e = row["prompt_ids"], self.tokenizer.example(row, "completion").ended()
        ids = e.ids.tolist()
        mask = turns_of(self.tokenizer, row, "completion", ids) or e.mask.tolist()
        start = mask.index(True)
        end = start + self.flags(1).max_new_tokens
        return prompt + ids[start:end], [False] * len(prompt) + mask[start:end]

    def _pieces(self, given, limit):
        flags, found = self.flags(1), []
        for row in given:
            e = self.tokenizer.example(row, flags.train_on)
            try:
                pieces, _ = packing.fit_to([e], limit, flags.overlong)
            except InputError:  # nothing is left of it
                continue
            for piece in pieces:
                found.append((row, piece.ids.tolist(), piece.mask.tolist()))
        return found

    def trained(self, number: int) -> tuple[list[int], list[bool]]:
        """Ids and mask of SFT's row `number`: the mask by turns_of, where that tells."""
        row, ids, mask = self.rows[number]
        return ids, turns_of(self.tokenizer, row, self.flags(1).train_on, ids) or mask

    def _pairs(self, given, limit):
        flags, found = self.flags(1), []
        for row in given:
            try:
                ((chosen, rejected),), _ = pairs.fit_to(
                    [self.tokenizer.pair(row)], limit, flags.overlong
                )
            except InputError:
                continue
            whole = "orpo" in flags.loss
            found.append([(e.ids.tolist(), (e.mask | whole).tolist()) for e in (chosen, rejected)])
        return found

    def row_of(self, serial: int) -> int:
        """The index in `rows` of the prompt that was drawn as number `serial`."""
        n = len(self.rows)
        return int(order(n, self.flags(1).seed, serial // n)[serial % n])

    # ---------------------------------------------------------------------------------- the models
    def has_weights(self, step: int) -> bool:
        """Whether the weights after `step` are at hand; 0: before the first one."""
        return step == 0 or step in self.saved

    def model(self, step: int):
        """-> (the model after `step`, in float64, its AdamW). They are not to be changed."""
        if step not in self.models:
            while len(self.models) >= HELD:
                self.models.pop(next(iter(self.models)))
            self.models[step] = self._loaded(step)
        return self.models[step]

    def copy(self, step: int):
        """The same, to be changed."""
        model, adamw = self.model(step)
        model = copy.deepcopy(model)
        other = plain.AdamW(model, adamw.weight_decay)
        other.first, other.second = dict(adamw.first), dict(adamw.second)
        other.steps = dict(adamw.steps)
        return model, other

    def _loaded(self, step):
        f = self.flags(step + 1)
        if f.quantize != "none":
            raise InputError("replay does not cover --quantize nf4.")
        model = _start(f, self.kind)
        rates = {"value": value_rate(f)} if self.kind == "ppo" else {}
        optimizer = optim.adamw(model, f.weight_decay, **rates)
        if step:
            checkpoint.load(self.saved[step], model, optimizer)
        adamw = plain.AdamW(model.double(), f.weight_decay)
        for name, p in model.named_parameters():
            if state := optimizer.state.get(p):
                adamw.first[name] = state["exp_avg"].double()
                adamw.second[name] = state["exp_avg_sq"].double()
                adamw.steps[name] = int(state["step"])
        return model, adamw

    @cached_property
    def reference(self):
        """The frozen model, in float64."""
        f = self.flags(1)
        folder = getattr(f, "reference_model", None) or f.model
        return hf.load_model(folder, "cpu").double().requires_grad_(False)

    @cached_property
    def teacher(self):
        """Of distillation, in float64."""
        folder = self.flags(1).teacher[0]
        if folder.startswith("http"):
            raise InputError("replay does not cover a --teacher on servers.")
        return hf.load_model(folder, "cpu").double().requires_grad_(False)


def _start(f, kind):
    """The model that a run begins with, in fp32."""

    def prepare(model):
        if f.lora:
            lora.apply(model, f.lora, f.lora_alpha, f.rslora, f.lora_targets, f.seed)
        return model

    if kind == "ppo":
        folder = None if f.value_model == "head" else f.value_model
        model = hf.load_actor_critic(f.model, folder, "cpu", prepare)
    elif kind == "rm":
        model = hf.load_scalar_model(f.model, "cpu", shard=prepare, new_head=True)
    else:
        model = hf.load_model(f.model, "cpu", shard=prepare)
    getattr(model, "policy", model).model.replays = True
    return model


def value_rate(f) -> float:
    """By how much PPO's value model learns faster than its policy."""
    return 1.0 if f.value_lr is None else f.value_lr / f.lr


def turns_of(tokenizer, row, train_on, ids) -> list[bool] | None:
    """The mask of a row of messages, by another way than the tokenizer's: an answer is what the
    rendered text gains when its message is added to those before it, with the generation prompt.
    None where that does not tell: of plain text, and where a template's text does not only grow."""
    messages = row.get("messages") or row.get("prompt")
    if not isinstance(messages, list) or train_on == "all":
        return None
    if "messages" not in row:
        messages = messages + row["completion"]
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if "messages" not in row:
        turns = [k for k in turns if k >= len(row["prompt"])]
    elif train_on == "completion":
        last = max((k for k, m in enumerate(messages) if m["role"] == "user"), default=-1)
        turns = [k for k in turns if k > last]
    if train_on == "last":
        turns = turns[-1:]
    names = ("tools",) if "tools" in row else ()
    variables = {name: row[name] for name in names} | (row.get("chat_template_kwargs") or {})
    tools = variables.pop("tools", None)

    def text_of(some, prompt=False):
        return tokenizer.template.render(some, tools, add_generation_prompt=prompt, **variables)

    whole = text_of(messages)
    encoding = tokenizer.raw.encode(whole, add_special_tokens=False)
    if encoding.ids != ids:
        return None
    mask = [False] * len(ids)
    for k in turns:
        try:
            before, after = text_of(messages[:k], True), text_of(messages[: k + 1]).rstrip()
        except InputError:  # a template that wants whole conversations
            return None
        if not whole.startswith(before) or not whole.startswith(after) or len(after) < len(before):
            return None
        for t, (start, end) in enumerate(encoding.offsets):
            mask[t] = mask[t] or (start < len(after) and end > len(before))
    return mask


# --------------------------------------------------------------------------------------- a sequence
def hidden(decoder, e):
    """The last hidden state of each token -> [T, D]."""
    token_T = torch.tensor(e.ids)
    bounds = torch.tensor([0, len(e.ids)], dtype=torch.int32)
    routes = Routes(e.routes if decoder.replays else None)
    return decoder.packed(token_T, torch.arange(len(e.ids)), bounds, len(e.ids), None, routes)


def passed(model, e, temperature, kept=True):
    """Log-prob of each token and entropy before it -> two [T]. kept: renormalised over what a cut
    of the sampling kept, if there was one."""
    policy = getattr(model, "policy", model)
    logits_TV = hidden(policy.model, e) @ policy.head_weight.T
    return plain.logp_and_entropy(logits_TV, e.ids, temperature, e.kept if kept else None)


def divergences(model, teacher, e, flags) -> list:
    """Of a student from its teacher, at each trained token."""
    student_TV, teacher_TV = (hidden(m.model, e) @ m.head_weight.T for m in (model, teacher))
    teacher_TV = teacher_TV[:, : student_TV.shape[1]]
    return [plain.divergence(flags, student_TV[t - 1], teacher_TV[t - 1]) for t in e.at]


def values(model, e):
    """An ActorCritic's value of the state before each token -> list; 0 for the first."""
    if isinstance(model.value, torch.nn.Linear):
        after_T = hidden(model.policy.model, e) @ model.value.weight[0]
    else:
        after_T = hidden(model.value.model, e) @ model.value.score.weight[0]
    return [after_T[0] * 0, *after_T[: len(e.ids) - 1]]


@torch.no_grad()
def logps(model, e, temperature, kept=True) -> list[float]:
    """Log-probs of the trained tokens."""
    logp_T, _ = passed(model, e, temperature, kept)
    return [float(logp_T[t]) for t in e.at]


@torch.no_grad()
def leaking(model, examples, temperature) -> dict[int, list[float]]:
    """index -> log-probs of its trained tokens, if the sequences of a micro-batch, in their order,
    attended to all that lies before them."""
    ids = [i for e in examples for i in e.ids]
    position_N = torch.tensor(np.concatenate([np.arange(len(e.ids)) for e in examples]))
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    policy = getattr(model, "policy", model)
    hidden_ND = policy.model.packed(torch.tensor(ids), position_N, bounds, len(ids))
    logp_NV = (hidden_ND @ policy.head_weight.T / temperature).log_softmax(-1)
    found, first = {}, 0
    for e in examples:
        found[e.index] = [float(logp_NV[first + t - 1, e.ids[t]]) for t in e.at]
        first += len(e.ids)
    return found
