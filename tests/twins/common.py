"""What the twins share: running a script in float64, reading what it wrote, comparing; the tiny
place; models of transformers in float64. The formulas of training are those of nanopost/plain.py.

Shapes: T tokens of one sequence, V vocabulary. Whatever belongs to tokens is aligned with them:
entry t is about token t, given those before it; entry 0 is 0.
"""

import importlib
import importlib.util
import json
import math
import shlex
from argparse import Namespace
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, metrics, parser_of
from small import small_config

import forks
from nanopost import plain
from nanopost.model import CausalLM, ScalarModel
from nanopost.save import save_model
from runs import toy
from twins import double

__all__ = ["metrics"]  # of a run's folder -> list of dicts
clip_gradients, learning_rate, AdamW = plain.clip_gradients, plain.learning_rate, plain.AdamW
STOP = 2  # the step after which a run is stopped that is then resumed
# Of a clock; and how many tokens experts have, which depends on what shares prefixes.
UNTWINNED = ("tokens_per_second", "seconds", "time/", "experts/")


# ----------------------------------------------------------------------------------------- running
def run(script, *arguments, ranks=1, resume=False, folder=ROOT, log=None):
    """Run a script of `folder` (of a fork's, say) in float64. resume: stop after the checkpoint of
    step STOP, then resume in a new process group. log: where several ranks print."""

    def start(stop, *more):
        if ranks == 1:
            double.run_script(Path(folder) / script, [*arguments, *more], stop)
        else:
            double.run_ranks(ranks, Path(folder) / script, [*arguments, *more], log, stop)

    if not resume:
        start(0)
        return
    arguments = (*arguments, "--save_every", STOP)
    try:
        start(STOP)
    except double.Stopped:
        pass
    assert not (Path(arguments[arguments.index("--out") + 1]) / "model.safetensors").exists()
    start(0, "--resume")


# A twin's module has
#
#     SCRIPT   "train_sft.py"
#     RUNS     {name: flags}, flags as one types them, {place} being the tiny place; "fork NAME" is
#              the run of a fork
#     METRICS  the names of all metrics that the twin computes
#     twin(args): yields the lines of metrics.jsonl, returns {"": weights, "value": those of a
#              subfolder, ...}
def arguments(module, name, place, out) -> list[str]:
    """The command line of a run of RUNS."""
    return [*shlex.split(module.RUNS[name].format(place=place)), "--record", "--out", str(out)]


def folder_of(name, tmp) -> Path:
    """The folder with the script of a run: a patched copy for a fork's."""
    if name.startswith("fork "):
        return forks.patched(tmp, name.removeprefix("fork "))
    return ROOT


@cache
def parser(script, folder=ROOT):
    return parser_of(Path(folder) / script)


def parsed(module, name, place, out, folder=ROOT) -> Namespace:
    """The script's own reading of a run's command line, and fork: its name, or None."""
    args = parser(module.SCRIPT, folder).parse_args(arguments(module, name, place, out))
    args.fork = name.removeprefix("fork ") if name.startswith("fork ") else None
    return args


def long(*names):
    """Runs left to `pytest -m long`."""
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


def check(module, name, place, tmp, ranks=1, resume=False, **tolerances) -> Namespace:
    """Run a script and its twin: AssertionError unless they agree -> args, for check_flags_matter.
    tmp: an empty folder."""
    folder = folder_of(name, tmp)
    args = parsed(module, name, place, tmp / "out", folder)
    run(
        module.SCRIPT,
        *arguments(module, name, place, args.out),
        ranks=ranks,
        resume=resume,
        folder=folder,
        log=tmp / "log",
    )
    agree(module, args, **tolerances)
    RAN.setdefault(module.SCRIPT, set()).add(name)
    return args


def agree(module, args, rel=1e-9, abs=1e-9):
    """AssertionError unless the twin agrees with what a run has written to args.out: with every
    number of its metrics (rel) and of its weights (abs)."""
    twin = module.twin(args)
    for found in metrics(args.out):  # each at once: a twin with another flag seldom gets to the end
        line = next(twin)
        COMPUTED.setdefault(module.SCRIPT, set()).update(line)
        compare(found, line, rel)
    try:
        more = next(twin)
    except StopIteration as end:
        parts = end.value
    else:
        raise AssertionError(f"the twin goes on with step {more['step']}")
    for part, theirs in parts.items():
        compare_weights(weights(Path(args.out) / part), theirs, abs)


def check_flags_matter(module, args, also=(), folder=ROOT, **tolerances):
    """Each flag of a run (args of `check`) changes the twin, and so does the fork: with the flag's
    default, or without the fork, it disagrees.

    also: {flag: value}, to try instead of the default.
    """
    for name, value in vars(args).items():
        other = dict(also).get(name, parser(module.SCRIPT, folder).get_default(name))
        if name in PLUMBING or name in INVARIANT or value == other:
            continue
        try:
            agree(module, Namespace(**{**vars(args), name: other}), **tolerances)
        except Exception:  # it has run with `value`, so an error too says that the flag is read
            continue
        raise AssertionError(f"--{name} {value}: the twin agrees with {other} too")


RAN, COMPUTED = {}, {}  # script -> its runs, and names of what its twin has computed


def check_metrics(module):
    """The METRICS of a twin are those that its runs have logged: for the last test of its file."""
    if not module.RUNS.keys() <= RAN.get(module.SCRIPT, set()):
        pytest.skip("one run after another, the whole test file says which metrics there are")
    differ = (COMPUTED[module.SCRIPT] - {"step"}) ^ module.METRICS
    assert not differ, differ


def given(module, name, args) -> dict:
    """The flags that another run gives too, with their values in args: as check_flags_matter's
    `also`, they are not tried once more."""
    other = vars(parsed(module, name, "PLACE", "OUT"))
    default = parser(module.SCRIPT).get_default
    return {k: value for k, value in vars(args).items() if other.get(k) != default(k)}


# -------------------------------------------------------------------------- what a run has written
def records(out) -> dict[int, tuple[dict, list[dict]]]:
    """{step: (its first line, a line per example)} of --record."""
    found = {}
    for path in sorted((Path(out) / "records").glob("[0-9]*.jsonl")):
        about, *examples = [json.loads(line) for line in path.read_text().splitlines()]
        found[about["step"]] = about, examples
    return found


def versions(out) -> dict[int, list[list[int]]]:
    """{seed of a group that was drawn for a step: the versions of the weights that drew each token
    of its samples}. Of rollouts that ran ahead, a clock decided them."""
    found = {}
    for path in (Path(out) / "records").glob("rollouts-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["version"] == line["step"]:  # of an evaluation
                continue
            assert line["seed"] not in found, "a prompt was taken twice"
            found[line["seed"]] = [sample["values"] for sample in line["versions"]]
    return found


def weights(folder) -> dict[str, torch.Tensor]:
    """name -> float64 tensor, of the model in a folder."""
    return {k: x.double() for k, x in load_file(Path(folder) / "model.safetensors").items()}


def of_module(module) -> dict[str, torch.Tensor]:
    """name -> tensor of a twin's model, as `weights` names them, adapters merged; a tied head is
    left out."""
    layers = dict(module.named_modules())
    found = {}
    for name, p in module.named_parameters():
        if ".lora_" in name:
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        if kind == "weight":
            p = p + layers[layer].get_delta_weight("default")
        found[name.replace(".base_layer.", ".")] = p.detach()
    for name in [name for name in found if ".experts." in name]:
        found |= _one_by_one(name, found.pop(name))
    return found


def _one_by_one(name, stacked):
    """The experts' matrices, which are one tensor each in a folder."""
    start, _, kind = name.rpartition(".")
    found = {}
    for number, matrix in enumerate(stacked):
        if kind == "gate_up_proj":
            gate, up = matrix.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up}
        else:
            parts = {kind: matrix}
        found |= {f"{start}.{number}.{part}.weight": x for part, x in parts.items()}
    return found


# ---------------------------------------------------------------------------------------- comparing
def compare(mine: dict, theirs: dict, rel=1e-9, abs=1e-11):
    """AssertionError unless a line of a script's metrics is the twin's: the same names, the same
    numbers, but for UNTWINNED."""
    wrong = []
    for name in [name for name in {**mine, **theirs} if not name.startswith(UNTWINNED)]:
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or a != pytest.approx(float(b), rel=rel, abs=abs):
            wrong.append(f"step {mine['step']}: {name} is {a}, the twin's {b}")
    assert not wrong, "\n".join(wrong)


def compare_weights(found: dict, expected: dict, abs=1e-9):
    """AssertionError unless both hold the same names and, within `abs`, the same numbers."""
    assert found.keys() == expected.keys()
    gap = {name: float((found[name] - expected[name]).abs().max()) for name in found}
    wrong = {name: x for name, x in gap.items() if not x <= abs}
    assert not wrong, f"weights that differ: {wrong}"


# Flags that no twin covers, and the test file that holds each. Flags that every run gives (data,
# out, model) are among them.
PLUMBING = {
    "model": "test_scripts.py",
    "data": "test_scripts.py",
    "out": "test_scripts.py",
    "device": "test_loops.py",
    "dtype": "twins/sft.py",
    "compile": "twins/sft.py",
    "dry_run": "test_plan.py",
    "save_every": "test_scripts.py",
    "save_minutes": "test_layout.py",
    "keep": "test_run.py",
    "save_dtype": "test_run.py",
    "quantize": "test_nf4.py",
    "reward_timeout": "test_rewards.py",
    "unsafe_code": "test_sandbox.py",
    "env_timeout": "test_environment.py",
    "engine": "test_vllm_scripts.py",
    "vllm": "test_vllm_scripts.py",
    "vllm_timeout": "test_vllm_scripts.py",
    "vllm_memory": "test_vllm_scripts.py",
    "record": "twins/common.py",
    "alarms": "test_run.py",
    "tensorboard": "test_boards.py",
    "wandb": "test_boards.py",
    "replay": "test_recording.py",
    "audit_every": "test_vllm_audit.py",
    "reduce": "test_dist.py",
    "replicas": "test_dist.py",
    "offload": "test_dist.py",
    "reproducible": "test_reproducible.py",
    "resume": "test_scripts.py",
    "overwrite": "test_loops.py",
}
# Flags that say how, not what, is computed: some run of the twins gives each a value other than its
# default, and the twin, which does not read it, agrees.
INVARIANT = {
    "tokens",
    "checkpointing",
    "kernels",
    "engine_rows",
    "engine_tokens",
    "reference",
    "cache",
}


# --------------------------------------------------------------------------------------------- rows
def read_rows(paths, rename=(), to_messages=False) -> list[dict]:
    """rename: ["theirs=ours", ...]. to_messages: a prompt or an answer that is text is a message of
    the user or the assistant."""
    ours = dict(pair.split("=") for pair in rename)
    rows = []
    for path in paths:
        rows += [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows = [{ours.get(name, name): value for name, value in row.items()} for row in rows]
    for row in rows if to_messages else ():
        for name in ("prompt", "completion", "chosen", "rejected"):
            if isinstance(row.get(name), str):
                row[name] = [message("user" if name == "prompt" else "assistant", row[name])]
    return rows


def split_rows(args) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and held-out rows: --holdout rows of a permutation that no seed changes,
    unless there is --eval_data; of the held-out ones, the first --eval_rows."""
    rows = read_rows(args.data, args.rename, args.to_messages)
    if args.eval_data:
        train, held_out = rows, read_rows(args.eval_data, args.rename, args.to_messages)
    else:
        chosen = np.random.default_rng((0, 0)).permutation(len(rows))[: args.holdout]
        train = [row for i, row in enumerate(rows) if i not in chosen]
        held_out = [row for i, row in enumerate(rows) if i in chosen]
    return train, held_out[: args.eval_rows]


def drawn(n, seed, first, count) -> list[int]:
    """Which of n rows are number first, first + 1, ... of a run: each epoch is a permutation."""
    found = []
    for i in range(first, first + count):
        found.append(int(np.random.default_rng((seed, i // n)).permutation(n)[i % n]))
    return found


def encoded(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer, messages, template=None) -> list[int]:
    """What a completion of these messages, or of plain text, continues. template: a file."""
    if isinstance(messages, str):
        return encoded(tokenizer, messages)
    return encoded(tokenizer, rendered(tokenizer, messages, template, add_generation_prompt=True))


def rendered(tokenizer, messages, template=None, **variables) -> str:
    source = Path(template).read_text() if template else None
    return tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, **variables
    )


def chat(tokenizer, messages, turns, template=None) -> tuple[list[int], list[bool]]:
    """A conversation -> (ids, mask), the mask true in the answers of these turns, from after the
    generation prompt to the end-of-turn token, without a newline after it. Right for a template
    whose text only grows from turn to turn and a tokenizer that merges nothing, as those of the
    place."""
    ids = encoded(tokenizer, rendered(tokenizer, messages, template))
    mask = [False] * len(ids)
    for k in turns:
        start = len(prompt_ids(tokenizer, messages[:k], template))
        end = len(encoded(tokenizer, rendered(tokenizer, messages[: k + 1], template).rstrip()))
        mask[start:end] = [True] * (end - start)
    return ids, mask


def answered(tokenizer, prompt, answer, template=None) -> tuple[list[int], list[bool]]:
    """A prompt and its answer, both text or both lists of messages -> (ids, mask), the answer
    trained. They end with the last trained token, as a rollout does."""
    if isinstance(prompt, str):
        before = encoded(tokenizer, prompt)
        after = encoded(tokenizer, answer) + [tokenizer.eos_token_id]
        return before + after, [False] * len(before) + [True] * len(after)
    turns = range(len(prompt), len(prompt) + len(answer))
    ids, mask = chat(tokenizer, prompt + answer, turns, template)
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]


def pair(tokenizer, row, template=None) -> list[tuple[list[int], list[bool]]]:
    """A row of pairs -> [chosen, rejected], as `answered`. A row without a prompt has the messages
    with which both sides begin as its prompt."""
    sides = row["chosen"], row["rejected"]
    prompt, shared = row.get("prompt"), 0
    if prompt is None:
        while sides[0][shared] == sides[1][shared]:
            shared += 1
        prompt = sides[0][:shared]
    return [answered(tokenizer, prompt, side[shared:], template) for side in sides]


def fitted(pairs, longest, how) -> list:
    """Pairs cut to `longest` tokens a side, or dropped, as --overlong says. Pairs are left out of
    which a side has nothing to train, or of which the sides are equal."""
    found = []
    for sides in pairs:
        if how == "drop" and max(len(ids) for ids, _ in sides) > longest:
            continue
        cut = [(ids[:longest], mask[:longest]) for ids, mask in sides]
        if all(any(mask[1:]) for _, mask in cut) and cut[0][0] != cut[1][0]:
            found.append(cut)
    return found


# ------------------------------------------------------------------------------------------- models
@cache
def modeling(kind="qwen3"):
    """transformers' modules of Qwen3 (kind: qwen3_moe: with experts), which compute norms, angles
    and scores of experts in float32, in float64."""
    transformers = pytest.importorskip("transformers")
    usual = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # silent about a new head
    loader = double.Loader(usual.__name__, usual.__file__)
    spec = importlib.util.spec_from_file_location(usual.__name__, usual.__file__, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if kind == "qwen3_moe":
        module.Qwen3MoeTopKRouter.forward = _route
        module.Qwen3MoeTopKRouter.given = None
    return module


def language_model(folder):
    """A folder's Qwen3ForCausalLM, or Qwen3MoeForCausalLM, in float64."""
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    options, name = {"attn_implementation": "eager"}, "Qwen3ForCausalLM"
    if kind == "qwen3_moe":
        options["experts_implementation"], name = "eager", "Qwen3MoeForCausalLM"
    loaded = getattr(modeling(kind), name).from_pretrained(folder, dtype=torch.float64, **options)
    loaded.model.embed_tokens.padding_idx = None  # a pad that was sampled has a gradient too
    return loaded


# ---- experts
def _route(router, hidden):
    """A router's scores: each token takes its best experts, the first ones those of `given`."""
    logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.T
    p = logits.softmax(-1)
    router.taken = p.topk(router.top_k).indices
    if router.given is not None:
        router.taken = torch.cat([router.given, router.taken[len(router.given) :]])
    scores = p.gather(1, router.taken)
    if router.norm_topk_prob:
        scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores, router.taken


def _routers(model):
    return [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]


def routes(model) -> list:
    """The experts that all tokens but the last of the last forward pass have taken, in each layer
    that has some."""
    return [router.taken[:-1] for router in _routers(model)]


@contextmanager
def routed(model, given):
    """Inside, tokens take the experts of `routes`."""
    for router, taken in zip(_routers(model), given, strict=True):
        router.given = taken
    yield
    for router in _routers(model):
        router.given = None


# ---- value models
def scalar_model(folder):
    """A folder's Qwen3ForSequenceClassification in float64. A language model gets a new head: drawn
    from seed 0, normal, of variance 1 / (width + 1)."""
    kind = modeling().Qwen3ForSequenceClassification
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    model = kind.from_pretrained(folder, num_labels=1, **options)
    # It has made its own from the usual module, which is not in float64.
    model.model = modeling().Qwen3Model.from_pretrained(folder, **options)
    if "score.weight" not in weights(folder):
        width = model.config.hidden_size
        draw = torch.Generator().manual_seed(0)
        head = torch.randn(1, width, generator=draw, dtype=torch.float64) / (width + 1) ** 0.5
        model.score.weight.data.copy_(head)
    model.model.embed_tokens.padding_idx = None
    return model


LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def with_adapters(model, args, first=0):
    """A model as it trains: with peft's adapters, if the run has some, drawn from --seed and the
    number of the layer, of which this model's first has the number `first`."""
    if not args.lora:
        return model
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=args.lora,
        lora_alpha=args.lora_alpha,
        use_rslora=args.rslora,
        target_modules=args.lora_targets or LINEAR,
    )
    peft.inject_adapter_in_model(config, model)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for number, layer in enumerate(layers, first):
        seed = np.random.SeedSequence((args.seed, number)).generate_state(1, np.uint64)[0] >> 2
        a_RI = layer.lora_A["default"].weight
        draw = torch.Generator().manual_seed(int(seed))
        uniform_RI = torch.rand(a_RI.shape, generator=draw, dtype=torch.float64)
        a_RI.data = (2 * uniform_RI - 1) / math.sqrt(a_RI.shape[1])
        layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.double()
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return model


def hidden(model, ids):
    """What a model's head reads -> [T, D]."""
    return model.model(torch.tensor([ids])).last_hidden_state[0]


def logits(model, ids):
    """-> [T, V]: entry t is of the token AFTER t."""
    return model(torch.tensor([ids])).logits[0]


def logp_and_entropy(model, ids, temperature=1.0, kept=None):
    """Log-prob of each token, and the entropy of the whole distribution before it -> two [T]. kept:
    for each token the ids among which it was drawn (none: all), over which its log-prob is
    renormalised."""
    return plain.logp_and_entropy(logits(model, ids), ids, temperature, kept)


def score(model, ids):
    """A scalar model's number at the last token."""
    return model.score(hidden(model, ids)[-1])[0]


def tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------- the place
def write_model(folder, seed=0, scalar=False, **changes):
    """A random Qwen3 of two layers, its distributions far from uniform, with the toy's tokenizer: a
    token per byte. scalar: a reward model."""
    toys = {"vocab_size": 264, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    toys |= {"tie_word_embeddings": True, "attention_bias": False}
    config = small_config(**{**toys, **changes})
    if scalar:
        config = config.with_scalar_head(0)
    model = ScalarModel(config) if scalar else CausalLM(config)
    for i, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i))
        p.data.copy_(0.2 * noise if p.ndim > 1 else 1 + noise / 8)  # norms other than 1
    save_model(folder, model.state_dict().items(), config, toy.tokenizer_files())


def message(role, content):
    return {"role": role, "content": content}


def sft_rows(count, first=0):
    """Rows of every form, of unequal lengths; conversations of one to three turns."""
    rows = []
    for i in range(first, first + count):
        messages = [message("system", "Add." + "!" * (i % 4))] if i % 3 == 0 else []
        for turn in range(1 + i % 3):
            a, b = 7 * i + turn, 3 * i + 11 * turn
            messages.append(message("user", f"{a}+{b}=?"))
            messages.append(message("assistant", f"{a + b}" + " ok" * (i % 5)))
        if i % 5 == 2:
            rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
        elif i % 5 == 3:
            rows.append({"prompt": f"{i} and ", "completion": f"{i + 1}" * 3})
        elif i % 9 == 4:
            rows.append({"text": f"{i}, {i + 1}, {i + 2}"})
        else:
            rows.append({"messages": messages})
    return rows


def pair_rows(count, first=0):
    """Pairs of every form and of unequal lengths, some with a long common start; a column margin in
    every other row."""
    rows = []
    for i in range(first, first + count):
        question = [message("user", f"{i}*4=?" + "?" * (i % 5))]
        chosen, rejected = f"{4 * i}" + " yes" * (i % 4), f"{i + 1}" + " no" * (i % 3)
        if i % 4 == 3:
            chosen, rejected = f"it is {chosen}", f"it is {rejected}"
        answers = [message("assistant", chosen)], [message("assistant", rejected)]
        row = {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
        if i % 7 == 4:
            row = {"chosen": question + answers[0], "rejected": question + answers[1]}
        if i % 7 == 5:
            row = {"prompt": f"{i}, ", "chosen": chosen, "rejected": rejected}
        if i % 2:
            row["margin"] = 0.25 * (i % 4)
        rows.append(row)
    return rows


def question_rows(count):
    """Rows of the fork multiple_choice."""
    rows = []
    for i in range(count):
        options = [str(i + k) for k in range(2 + i % 3)]
        rows.append({"question": f"{i}+1=?", "options": options, "answer": i % 2})
    return rows


def labelled_rows(count, first=0):
    """Rows of KTO, two good ones to a bad one."""
    rows = []
    for i in range(first, first + count):
        prompt = [message("user", f"{i}-1=?" + "." * (i % 4))]
        completion = [message("assistant", f"{i - 1}" + " so" * (i % 5))]
        rows.append({"prompt": prompt, "completion": completion, "label": i % 3 != 0})
    return rows


def prompt_rows(count, first=0):
    """Prompts of unequal lengths, with the columns answer and scale."""
    rows = []
    for i in range(first, first + count):
        prompt = [message("user", f"{i}+{i}=?" + " please" * (i % 3))]
        rows.append({"prompt": prompt, "answer": f"{2 * i}", "scale": 1 + i % 4})
    return rows


REWARDS = '''
def letters(completions, **columns):
    """Letters of the decoded text, less than 1 each."""
    return [sum(c.isalpha() for c in text[0]["content"]) / 4 - 0.5 for text in completions]


def scaled(completions, scale, **columns):
    """Reads a column; does not apply to every fifth kind of completion."""
    sums = [sum(map(ord, text[0]["content"])) for text in completions]
    return [None if s % 5 == 0 else (s % 7) * x / 3 for s, x in zip(sums, scale)]
'''
CHAT_TEMPLATE = (
    "{%- for m in messages -%}[{{ m['role'] }}] {{ m['content'] }}"
    "{{ '<|end|>' if m['role'] == 'assistant' else '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}[assistant] {% endif -%}"
)


def write_place(folder):
    """A folder with model/, other/ (another random model), rm/ (a reward model), experts/ (a
    mixture of experts), rows of each kind with held-out ones beside them (NAME.jsonl and
    NAME_held_out.jsonl: sft, pairs, labelled, prompts), rows whose columns have other names
    (dialogs.jsonl of sft, theirs.jsonl of pairs), questions.jsonl of a fork, reward.py, chat.jinja,
    and lines.jinja, which writes a newline, not trained, after an answer."""
    write_model(folder / "model")
    write_model(folder / "other", seed=1)
    write_model(folder / "rm", seed=2, scalar=True)
    write_model(folder / "experts", model_type="qwen3_moe")
    kinds = {"sft": sft_rows, "pairs": pair_rows, "labelled": labelled_rows, "prompts": prompt_rows}
    for name, rows in kinds.items():
        toy.write_rows(folder / f"{name}.jsonl", rows(9))
        toy.write_rows(folder / f"{name}_held_out.jsonl", rows(5, first=20))
    dialogs = [{"dialog": row["messages"]} for row in sft_rows(20) if "messages" in row]
    toy.write_rows(folder / "dialogs.jsonl", dialogs)
    theirs = [dict(row) for row in pair_rows(16)]
    for row in theirs:
        row |= {"better": row.pop("chosen"), "worse": row.pop("rejected")}
    toy.write_rows(folder / "theirs.jsonl", theirs)
    toy.write_rows(folder / "questions.jsonl", question_rows(8))
    (folder / "reward.py").write_text(REWARDS)
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    lines = CHAT_TEMPLATE.replace("<|end|>", "<|end|>\\n")
    (folder / "lines.jinja").write_text(lines)
    return folder
