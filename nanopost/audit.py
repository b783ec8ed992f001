"""python -m nanopost.audit: does a vLLM server compute what the trainer's weights say? If not, why?

    --model DIR --vllm URL                     a trainer's folder beside a server, anybody's
    --model DIR --vllm URL --before DIR        and the weights before the last update
    --model DIR --vllm URL --after_update CMD  audit, run CMD, which has the trainer send weights to
                                               the server, and audit again

It prints a line for each comparison, and exits with 1 if one fails. A run with --vllm does the same
after a sync (--audit_every), and stops with one sentence.

Three comparisons. Scores: log-probs of fixed sequences, and of tokens that the server samples.
Prints: each matrix times a fixed vector, as the server computes it, whatever it has packed the
weights into (needs a server of nanopost.vllm_worker). Bytes: vLLM's own checksums. A cause is named
only if it reproduces the server's numbers.

Shapes: T tokens of a sequence, I inputs and O outputs of a matrix.
"""

import base64
import hashlib
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nanopost import InputError, StepError, dist, hf
from nanopost.batch import Example, batch_of
from nanopost.engine import cut
from nanopost.forward import logprobs
from nanopost.hf import EMBEDDING, HEAD
from nanopost.terminal import say
from nanopost.tokenizer import Tokenizer
from nanopost.vllm import WRONG, Refused, Server, ServerError, _about

LENGTHS = (16, 32, 136)  # tokens of the scored sequences; the last one fills a block of a cache
SAMPLED = 24  # tokens that the server samples
TEMPERATURE, TOP_P = 0.7, 0.5  # that it samples with
DRAWN = {  # what is sampled -> after which sequence, with which top_p
    f"temperature {TEMPERATURE}": (0, 1.0),
    f"top_p {TOP_P}": (0, TOP_P),
    "a prompt it has seen before": (-1, 1.0),
}
PLAIN, CUT, CACHED = DRAWN
# Largest mean difference of log-probs, nats. Random ids are unlikely tokens, whose log-probs bf16
# rounds by 0.1 on average in a sound SmolLM2-135M.
SCORE = {torch.float32: 1e-4, torch.bfloat16: 0.4}
PRINT = {torch.float32: 5e-5, torch.bfloat16: 4e-2}  # largest difference, in units of the rms
NOTHING = hashlib.sha256(b"").hexdigest()  # the checksum of a packed layer on a CPU
TEXT = "12+34=? Grüße,  東京\n\tdef f(x): return x_1"


# ------------------------------------------------------------------------------------------- scores
def probes(tokenizer, vocab_size: int, positions: int) -> list[list[int]]:
    """The sequences that are scored: random ids, the same for every run with this vocabulary.

    They need no data, reach rows all over the embedding, and no training makes them likely.
    """
    unused = set(tokenizer.unused_ids(vocab_size))
    ids = [i for i in range(vocab_size) if i not in unused]
    generator = np.random.default_rng(0)
    longest = min(LENGTHS[-1], positions - SAMPLED)
    return [generator.choice(ids, min(length, longest)).tolist() for length in LENGTHS]


@dataclass
class Answer:
    """What a server says of the probes."""

    scores: list[np.ndarray]  # fp32 [T] of each probe; 0 at the first token
    sampled: dict[str, tuple[list[int], np.ndarray]]  # key of DRAWN -> ids, their log-probs
    prints: dict | None = None
    about: dict = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)


def ask(server: Server, sequences: list[list[int]], config) -> Answer:
    """Score sequences on a server, let it sample, and take its prints and checksums. ServerError if
    it fails."""
    tokens_route = _has(server, "/inference/v1/generate", {"token_ids": []})
    model = server.get("/v1/models")["data"][0]["id"]

    def complete(ids, **sampling):
        """-> what the server says of the prompt, sampled ids, their log-probs."""
        try:
            return request(ids, **sampling)
        except Refused as error:
            if "float values" not in str(error):
                raise
            return [{}] * len(ids), ([0] * SAMPLED, [np.nan] * SAMPLED)  # JSON has no nan

    def request(ids, **sampling):
        sampling = {"n": 1, "temperature": 1.0, "logprobs": 0, "seed": 0, **sampling}
        if tokens_route:
            body = {"token_ids": ids, "sampling_params": sampling}
            answer = server.post("/inference/v1/generate", body)
            content = answer["choices"][0]["logprobs"]["content"]
            found = [x["token_id"] for x in content], [x["logprob"] for x in content]
            return answer["prompt_logprobs"], found
        body = {"model": model, "prompt": ids, "return_token_ids": True, **sampling}
        choice = server.post("/v1/completions", body)["choices"][0]
        return choice["prompt_logprobs"], (
            choice["token_ids"],
            choice["logprobs"]["token_logprobs"],
        )

    def score(ids):
        prompt, _ = complete(ids, max_tokens=1, prompt_logprobs=0)
        if not prompt or len(prompt) != len(ids):
            raise ServerError(f"{server.url}: no log-probs of a prompt's tokens")
        found = [0.0] + [prompt[t].get(str(ids[t]), {}).get("logprob") for t in range(1, len(ids))]
        return np.array([np.nan if x is None or x < -9000 else x for x in found], np.float32)

    def sample(which, top_p):
        sampling = {"temperature": TEMPERATURE, "top_p": top_p, "ignore_eos": True}
        _, (ids, logps) = complete(sequences[which], max_tokens=SAMPLED, **sampling)
        return ids, np.array(logps, np.float32)

    with ThreadPoolExecutor(len(sequences) + len(DRAWN)) as pool:
        scores = [pool.submit(score, ids) for ids in sequences]
        sampled = {name: pool.submit(sample, *how) for name, how in DRAWN.items()}
        answer = Answer(
            [task.result() for task in scores],
            {name: task.result() for name, task in sampled.items()},
        )
    answer.prints, answer.about = prints_of(server, config)
    answer.checksums = checksums(server)
    return answer


def _has(server, path, body) -> bool:
    """Whether a server has a route, by its answer to a request that it must refuse."""
    try:
        server.post(path, body, 10.0)
    except Refused as error:
        return "404" not in str(error)
    return True


def gap(engine: list[np.ndarray], trainer: list[np.ndarray]) -> float:
    """Mean difference of the log-probs of all tokens but the first of each sequence, in nats."""
    found = [np.abs(x - y)[1:] for x, y in zip(engine, trainer)]
    return float(np.concatenate(found).mean())


def cut_gap(cut_T, logp_T, top_p: float) -> float:
    """How far log-probs under a cut are from what they can be, given those without it, in nats.

    The tokens kept are the fewest that hold top_p of the mass, so they hold at most top_p and the
    mass of the least likely one of them, which is at most that of the sampled token.
    """
    kept_T = logp_T.astype(np.float64) - cut_T
    low_T, high_T = np.log(top_p), np.log(np.minimum(1.0, top_p + np.exp(logp_T)))
    return float(np.maximum(np.maximum(low_T - kept_T, kept_T - high_T), 0.0).mean())


# ------------------------------------------------------------------------------------------- prints
def vector(width: int) -> torch.Tensor:
    """The fixed vector that matrices of this width are multiplied with, exact in bf16: fp32 [I]."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, generator=generator).bfloat16().float()


def print_of(tensor: torch.Tensor) -> np.ndarray:
    """A matrix times the vector of its width; a norm or a bias as it is: fp32 [O]."""
    if tensor.ndim == 2:
        tensor = tensor.float() @ vector(tensor.shape[1]).to(tensor.device)
    return tensor.detach().float().cpu().numpy().copy()


def prints_of(server: Server, config) -> tuple[dict | None, dict]:
    """A server's prints under checkpoint names, and how it computes; None if it gives none."""
    widths = {config.width, config.mlp_width, config.heads * config.head_dim}
    vectors = {str(width): vector(width).tolist() for width in widths}
    body = {"method": "nanopost_prints", "kwargs": {"vectors": vectors}, "timeout": 60}
    try:
        (found, *_) = server.post("/collective_rpc", body)["results"]
    except ServerError:
        return None, {}
    about = found.pop("about")
    if about["ranks"] > 1:
        return None, about
    prints = {
        name: np.frombuffer(base64.b64decode(text), np.float32) for name, text in found.items()
    }
    return split(prints, config), about


def split(prints: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """vLLM's fused projections -> those of the checkpoint."""
    query = config.heads * config.head_dim
    key = query + config.kv_heads * config.head_dim
    found = {}
    for name, x_O in prints.items():
        if ".qkv_proj." in name:
            for part, x in zip("qkv", np.split(x_O, [query, key])):
                found[name.replace("qkv_proj", f"{part}_proj")] = x
        elif ".gate_up_proj." in name:
            for part, x in zip(("gate", "up"), np.split(x_O, 2)):
                found[name.replace("gate_up", part)] = x
        else:
            found[name] = x_O
    return found


def distance(x_O: np.ndarray, y_O: np.ndarray) -> float:
    """The largest difference of two prints, in units of the larger one's rms."""
    if x_O.shape != y_O.shape or not np.isfinite(x_O).all():
        return np.inf
    rms = max(np.sqrt(np.square(x_O).mean()), np.sqrt(np.square(y_O).mean()), 1e-30)
    return float(np.abs(x_O - y_O).max() / rms)


def wrong(engine: dict, now: dict, limit: float) -> list[str]:
    """The tensors whose prints differ, in the order of the checkpoint, a tied head last."""
    names = [*now, *([HEAD] if HEAD not in now else [])]
    there = [name for name in names if name in engine]
    return [name for name in there if distance(engine[name], now[_own(name, now)]) > limit]


def _own(name, prints):
    return name if name in prints else EMBEDDING  # a tied head's


def rotary_orders(heads: int, width: int) -> dict[str, np.ndarray]:
    """Orders of a projection's rows: row i of it is row order[i] of Hugging Face's layout, which
    has the halves of each head's rotation one after the other; the original has them in pairs."""
    rows = np.arange(heads * width)
    return {
        "in the original rotary order (pairs side by side)": rows.reshape(heads, 2, width // 2)
        .swapaxes(1, 2)
        .ravel(),
        "converted to Hugging Face's rotary order twice": rows.reshape(heads, width // 2, 2)
        .swapaxes(1, 2)
        .ravel(),
    }


def cause_of(
    name: str,
    x_O: np.ndarray,
    now: dict[str, np.ndarray],
    before: dict[str, np.ndarray] | None,
    config,
    limit: float,
    weight: torch.Tensor | None = None,
) -> str:
    """Why a server's print of one tensor is wrong: the first explanation that gives the same print.

    weight: the trainer's tensor, for explanations that need more than its print.
    """

    def same(y_O):
        return distance(x_O, y_O) <= limit

    own = _own(name, now)
    y_O = now[own]
    if x_O.shape != y_O.shape:
        return f"has {len(x_O)} rows instead of {len(y_O)}"
    if not np.isfinite(x_O).all():
        return "is not finite"
    if before is not None and distance(before[own], y_O) > limit:
        if same(before[own]):
            return "is that of the version before"
        scale = limit * max(np.sqrt(np.square(y_O).mean()), 1e-30)
        old_O = np.abs(x_O - y_O) > scale
        if (np.abs(x_O - before[own])[old_O] <= scale).all():
            rows = old_O.nonzero()[0]
            return f"has rows {rows[0]} to {rows[-1]} of the version before ({len(rows)} rows)"
    if not x_O.any():
        return "is zero"
    for other, z_O in now.items():
        if other != own and same(z_O) and not same(y_O):
            return f"is {other}"
    if weight is not None and same(print_of(weight.bfloat16())):
        return "is rounded to bfloat16"
    if weight is not None and weight.ndim == 2:
        x_I = vector(weight.shape[1])
        if weight.shape[0] == weight.shape[1] and same((weight.float().T @ x_I).numpy()):
            return "is transposed"
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
    heads = heads.get(name.split(".")[-2])
    if heads:
        for text, order in rotary_orders(heads, config.head_dim).items():
            if same(y_O[order]):
                return f"has its rows {text}"
        from_H = [
            min(range(heads), key=lambda h: distance(part, y_O.reshape(heads, -1)[h]))
            for part in x_O.reshape(heads, -1)
        ]
        if same(y_O.reshape(heads, -1)[from_H].ravel()):
            return f"has its heads in the order {' '.join(map(str, from_H))}"
    if name.endswith("o_proj.weight") and weight is not None:
        x_I = vector(weight.shape[1])
        for text, order in rotary_orders(config.heads, config.head_dim).items():
            if same((weight[:, order].float() @ x_I).numpy()):
                return f"has its columns {text}"
    if distance(np.sort(x_O), np.sort(y_O)) <= limit:
        return "has its rows in another order"
    scale = float(x_O @ y_O / max(y_O @ y_O, 1e-30))
    if abs(scale) > 1e-3 and distance(x_O, scale * y_O) <= limit:
        return f"is scaled by {scale:.4g}"
    if distance(x_O, y_O) <= PRINT[torch.bfloat16]:
        return "differs a little, as by a small update: compare with the weights before (--before)"
    return "holds other numbers" + ("" if before is None else ", neither the new nor the old ones")


def some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def conclusion(causes: dict[str, str], names: list[str], changed: list[str]) -> str:
    """One clause for the causes of all wrong tensors. names: all tensors, in the order in which
    they were sent. changed: those that the last update has changed."""
    old = [name for name, cause in causes.items() if cause == "is that of the version before"]
    if old and old == [*causes]:
        if set(changed) <= set(old):
            return "stale weights: every tensor is that of the version before"
        if old == [HEAD] and HEAD not in names:
            return (
                "a stale tied head: the embedding is new, but the server's packed copy of it, the "
                "head, is that of the version before"
            )
        part = [name for name in changed if name in old]
        first = changed.index(part[0])
        if len(part) > 1 and changed[first : first + len(part)] == part:
            return (
                f"a partial update: a bucket of weights is missing, {part[0]} to {part[-1]} "
                f"({len(part)} of {len(changed)} tensors) are those of the version before"
            )
        return f"a partial update: {some(old)} of the version before"
    if all(".up_proj" in c or ".gate_proj" in c for c in causes.values()):
        layers = sorted({name.split(".mlp.")[0] for name in causes})
        return f"gate and up are swapped in {some(layers)}"
    rounded = [name for name, cause in causes.items() if cause == "is rounded to bfloat16"]
    if len(rounded) == len(causes) and len(rounded) > len(names) / 3:
        return "low precision: all weights are rounded to bfloat16, and nothing else differs"
    kinds = {}
    for name, cause in causes.items():
        kinds.setdefault(cause, []).append(name)
    clauses = [f"{some(members)} {cause}" for cause, members in kinds.items()]
    more = f"; and {len(clauses) - 3} more" if len(clauses) > 3 else ""
    return "; ".join(clauses[:3]) + more


# -------------------------------------------------------------------------------------------- bytes
class Digests:
    """SHA-256 of weights as vLLM's /weight_checker gives them: projections fused, rows of the
    vocabulary padded with zeros to a multiple of 64."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.hashes = dtype, {}

    def add(self, name: str, tensor: torch.Tensor):
        """In the order of the checkpoint: q, k, v, and gate, up."""
        fused = re.sub(r"\b[qkv]_proj", "qkv_proj", name)
        fused = re.sub(r"\b(gate|up)_proj", "gate_up_proj", fused)
        data = tensor.detach().to("cpu", self.dtype).contiguous().view(torch.uint8)
        found = self.hashes.setdefault(fused, hashlib.sha256())
        found.update(data.numpy())
        if name in (EMBEDDING, HEAD):
            found.update(bytes(data.nbytes // len(tensor) * (-len(tensor) % 64)))

    @classmethod
    def of(cls, named_tensors, dtype) -> "Digests":
        digests = cls(dtype)
        for name, tensor in named_tensors:
            digests.add(name, tensor)
        return digests

    def differ(self, theirs: dict[str, str]) -> list[str]:
        """Of the tensors that both cover."""
        return [n for n, h in self.hashes.items() if n in theirs and h.hexdigest() != theirs[n]]


def checksums(server: Server) -> dict[str, str]:
    """A server's SHA-256 of each tensor, where it covers that; {} where it shards or has none."""
    try:
        found = server.post("/weight_checker", {"action": "checksum"})["checksums"]
    except ServerError:
        return {}
    if len({key.rpartition(":")[0] for key in found}) != 1:
        return {}
    return {key.rpartition(":")[2]: h for key, h in found.items() if h != NOTHING}


# ------------------------------------------------------------------------------------------ verdict
@dataclass
class Ours:
    """What the trainer says of the same."""

    scores: list[np.ndarray]
    sampled: dict[str, np.ndarray]  # key of DRAWN -> of the sampled tokens
    raw: np.ndarray  # of the first of them, at temperature 1
    prints: dict[str, np.ndarray]
    digests: Digests
    before: dict[str, np.ndarray] | None = None  # prints of the version before
    scores_before: list[np.ndarray] | None = None


def ours_of(score: Callable, sequences, answer: Answer, prints, digests, **before) -> Ours:
    """score(sequences, temperature) -> fp32 [T] of each, by the trainer. Calls it twice."""
    prompts = {name: sequences[which] for name, (which, _) in DRAWN.items()}
    longer = {name: prompts[name] + ids for name, (ids, _) in answer.sampled.items()}
    *scores, raw = score([*sequences, longer[PLAIN]], 1.0)
    sampled = {
        name: logp_T[len(prompts[name]) :]
        for name, logp_T in zip(longer, score([*longer.values()], TEMPERATURE))
    }
    return Ours(scores, sampled, raw[len(prompts[PLAIN]) :], prints, digests, **before)


def compare(answer: Answer, ours: Ours, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """(what was compared, the difference, its limit) for each comparison."""
    limit = SCORE[dtype]
    rows = [("log-probs of fixed sequences, nats", gap(answer.scores, ours.scores), limit)]
    for name, (ids, logp_T) in answer.sampled.items():
        found = np.abs(logp_T - ours.sampled[name]).mean()
        if name == CUT:
            found = cut_gap(logp_T, ours.sampled[name], TOP_P)
        rows.append((f"of {len(ids)} sampled tokens, {name}", float(found), limit))
    if answer.prints is not None:
        there = [name for name in (*ours.prints, HEAD) if name in answer.prints]
        pairs = [(answer.prints[name], ours.prints[_own(name, ours.prints)]) for name in there]
        worst = max(distance(x, y) for x, y in pairs)
        rows.append((f"{len(there)} tensors times a vector", worst, _print_limit(answer, dtype)))
    covered = ours.digests.hashes.keys() & answer.checksums.keys()
    differ = _differ(answer, ours)
    if covered and (answer.prints is not None or len(differ) < len(covered)):
        rows.append((f"{len(covered)} tensors' bytes (SHA-256)", float(len(differ)), 0.0))
    return rows


def _differ(answer, ours) -> list[str]:
    """Tensors whose bytes differ, if both sides have the same precision."""
    if answer.about.get("dtype", "") not in str(ours.digests.dtype):
        return []
    return ours.digests.differ(answer.checksums)


def _print_limit(answer, dtype) -> float:
    """Of the coarser precision of server and trainer."""
    full = answer.about.get("dtype") == "float32" and dtype == torch.float32
    return PRINT[torch.float32 if full else torch.bfloat16]


def failed(rows) -> list[tuple[str, float, float]]:
    return [row for row in rows if not row[1] <= row[2]]  # nan too


def why(
    answer: Answer, ours: Ours, dtype, config, weights: Iterable[tuple[str, torch.Tensor]]
) -> str:
    """The cause, as one clause. weights: the trainer's, read once if a tensor differs."""
    limit, bound = SCORE[dtype], _print_limit(answer, dtype)
    names = [*ours.prints]
    changed = names
    if ours.before is not None:
        changed = [n for n in names if distance(ours.before[n], ours.prints[n]) > bound] or names

    bad = wrong(answer.prints, ours.prints, bound) if answer.prints is not None else []
    causes = {}
    for name, tensor in weights if bad else ():
        for other in bad:
            if other == name or (other not in names and name == EMBEDDING):
                about = (answer.prints[other], ours.prints, ours.before, config, bound)
                causes[other] = cause_of(other, *about, weight=tensor.cpu())
    if causes:
        return conclusion({name: causes[name] for name in bad}, names, changed)

    found = gap(answer.scores, ours.scores)
    if not found <= limit:
        if not np.isfinite(found):
            return "log-probs that are missing or not finite"
        if ours.scores_before is not None and gap(answer.scores, ours.scores_before) <= limit:
            return "stale weights: its log-probs are those of the version before"
        if answer.about.get("dtype", "float32") != str(dtype).removeprefix("torch."):
            return (
                f"low precision: it computes in {answer.about['dtype']} and the trainer in "
                f"{str(dtype).removeprefix('torch.')}; all {len(names)} tensors are the trainer's"
            )
        if answer.prints is not None:
            return (
                "not the weights, which are all the trainer's: it computes something else with "
                "them (config.json, say rope_theta; a quantized cache; an attention kernel)"
            )
        return ""
    off = {
        name: np.abs(logp_T - ours.sampled[name]) for name, (_, logp_T) in answer.sampled.items()
    }
    off = {name: float(x.mean()) for name, x in off.items()}
    if np.abs(answer.sampled[PLAIN][1] - ours.raw).mean() <= limit < off[PLAIN]:
        return (
            "its log-probs are those before temperature and cuts: start it with --logprobs-mode "
            "processed_logprobs"
        )
    if off[PLAIN] <= limit < off[CACHED]:
        return (
            "stale keys and values: a prompt that it has seen before the update is answered from "
            "its prefix cache; reset that after each update (/reset_prefix_cache)"
        )
    if off[PLAIN] <= limit and off[CUT] <= limit < cut_gap(
        answer.sampled[CUT][1], ours.sampled[CUT], TOP_P
    ):
        return "its log-probs do not contain the cut (top_p), only the temperature"
    if differ := _differ(answer, ours):
        return f"the bytes of {some(differ)} differ, by less than the other comparisons show"
    return ""


def sentence(url: str, step, rows, cause: str) -> str:
    what, number, limit = (failed(rows) or rows)[0]
    cause = cause or "no explanation that was tried gives these numbers"
    return (
        f"{step}{url} is not the trainer's policy ({what}: {number:.2g}, limit {limit:g}): {cause}."
    )


# -------------------------------------------------------------------------------------- in a run
class Audit:
    """After a sync: is every server the policy? Each rank has one; rank 0 asks the servers."""

    def __init__(self, model, tokenizer, world, every: int):
        """model: the root of the trainer's (the policy, or with a value function). every: syncs
        from one audit to the next; 0: none."""
        config = model.config
        self.model, self.config, self.world, self.every = model, config, world, every
        self.tokenizer = tokenizer
        self.fit(config.max_positions)
        self.part = "policy." if hasattr(model, "policy") else ""
        self.count = -1  # of syncs before this one
        self.prints, self.before, self.scores = {}, None, None
        self.digests = Digests(world.dtype)
        self.known = set()  # servers whose tokenizer is right

    def fit(self, positions: int):
        """Score no longer sequences than these: positions that a server has."""
        self.sequences = probes(self.tokenizer, self.config.vocab_size, positions)

    def due(self) -> bool:
        return self.every > 0 and self.count % self.every == 0

    def watch(self, named_tensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the weights of a sync on, and keep a print of each: a few numbers per row."""
        self.count += 1
        self.before, self.prints = self.prints or None, {}
        self.digests = Digests(self.world.dtype)
        for name, tensor in named_tensors:
            if self.every:
                self.prints[name] = print_of(tensor.to(self.world.dtype))
            if self.due() and self.world.rank == 0:
                self.digests.add(name, tensor)
            yield name, tensor

    def check(self, servers: list[Server], version: int):
        """StepError if a server is not the policy. A collective.

        A server that does not answer is left to the next rollout.
        """
        if not self.due():
            return
        answers = {}
        for server in servers if self.world.rank == 0 else ():
            try:
                self._check_tokenizer(server)
                answers[server.url] = ask(server, self.sequences, self.config)
            except Refused as error:
                answers[server.url] = InputError(f"{error}.")
            except InputError as error:
                answers[server.url] = error
            except (ServerError, *WRONG) as error:
                answers[server.url] = _about(server, error)
        (answers,) = dist.gather([answers] if self.world.rank == 0 else [])
        scores = self.scores if self.every == 1 else None  # those of the sync before
        for url, answer in answers.items():
            if isinstance(answer, InputError):
                raise answer
            if isinstance(answer, ServerError):
                if self.world.rank == 0:
                    say(f"warning: not audited: {answer}")
                continue
            before = {"before": self.before, "scores_before": scores}
            ours = ours_of(self._score, self.sequences, answer, self.prints, self.digests, **before)
            self.scores = ours.scores
            rows = compare(answer, ours, self.world.dtype)
            if dist.all_max(bool(failed(rows)))[0]:
                weights = iter(dist.full_weights(self.model, self.part))
                cause = why(answer, ours, self.world.dtype, self.config, weights)
                for _ in weights:  # a collective, which `why` may not have needed
                    pass
                causes = dist.gather([sentence(url, f"step {version}: ", rows, cause)])
                raise StepError(causes[0])

    def _score(self, sequences, temperature):
        return logprobs(
            self.model,
            examples(sequences),
            sum(map(len, sequences)),
            temperature,
            self.world.device,
        )

    def _check_tokenizer(self, server):
        if server.url not in self.known:
            if not same_text(server, self.tokenizer):
                raise InputError(
                    f"{server.url} has another tokenizer than --model: start it with that model's "
                    "folder."
                )
            self.known.add(server.url)


def examples(sequences) -> list[Example]:
    return [Example(ids, np.arange(len(ids)) > 0) for ids in sequences]


def same_text(server: Server, tokenizer) -> bool:
    """Whether text has the same token ids there; also if the server encodes none."""
    model = server.get("/v1/models")["data"][0]["id"]
    try:
        body = {"model": model, "prompt": TEXT, "add_special_tokens": False}
        return server.post("/tokenize", body)["tokens"] == list(tokenizer.encode(TEXT))
    except ServerError:
        return True


# ------------------------------------------------------------------- the cause, by scores alone
class Edited(nn.Module):
    """A model with some of its tensors replaced for a while. head: a head for a tied model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @contextmanager
    def tensors(self, edit: dict[str, torch.Tensor]):
        model, own = self.model, dict(self.model.named_parameters())
        kept = {name: own[name].detach().clone() for name in edit if name in own}
        with torch.no_grad():
            for name in kept:
                own[name].copy_(edit[name])
            if HEAD in edit and HEAD not in own:
                head = nn.Linear(*edit[HEAD].shape[::-1], bias=False, device="meta")
                head.weight = nn.Parameter(edit[HEAD], requires_grad=False)
                model.lm_head = head
            try:
                yield
            finally:
                for name, tensor in kept.items():
                    own[name].copy_(tensor)
                if HEAD not in own:
                    model.lm_head = None


def search(
    model, scores: list[np.ndarray], score: Callable, before: dict | None, limit: float
) -> str:
    """Which change of the trainer's weights gives a server's scores -> a clause, or "".

    A forward pass for each hypothesis. score() -> the model's scores.
    """
    edited = Edited(model)
    own = {name: p.detach() for name, p in model.named_parameters()}
    first = score()
    start = gap(scores, first)

    def explains(edit):
        with edited.tensors(edit):
            found = gap(scores, score())
        return found <= limit and found < start / 4

    for group in hypotheses(own, before, model.config):
        # Scores alone cannot tell a zero gate from a zero up_proj.
        if found := [clause for clause, edit in group if explains(edit)]:
            return " or ".join(found[:3])
    if before is None:
        return ""
    # Several tensors of the version before: to first order their effects add up.
    changed = [name for name in own if not torch.equal(own[name], before[name])]
    effects = []
    for name in changed:
        with edited.tensors({name: before[name]}):
            effects.append(_flat(score()) - _flat(first))
    matrix, rest = np.stack(effects, 1), _flat(scores) - _flat(first)
    share, *_ = np.linalg.lstsq(matrix, rest, rcond=None)
    guesses = [[name for name, s in zip(changed, share) if s > 0.5]]
    for i in range(1, len(changed)):  # a bucket, at the end or at the beginning
        guesses += [changed[i:], changed[:i]]
    for names in guesses:
        if names and explains({name: before[name] for name in names}):
            causes = dict.fromkeys(names, "is that of the version before")
            return conclusion(causes, [*own], changed)
    return ""


def _flat(scores):
    return np.concatenate([x[1:] for x in scores]).astype(np.float64)


def hypotheses(own: dict, before: dict | None, config) -> Iterator[Iterable[tuple[str, dict]]]:
    """Groups of (clause, the tensors that a server would then have), the commonest first."""
    layers = [name.removesuffix(".self_attn.q_proj.weight") for name in own if ".q_proj.w" in name]
    orders = rotary_orders(config.heads, config.head_dim)
    key_orders = rotary_orders(config.kv_heads, config.head_dim)

    def rotary(layers, text):
        edit = {}
        for layer in layers:
            for part, order in (("q", orders[text]), ("k", key_orders[text])):
                for kind in ("weight", "bias"):
                    if (name := f"{layer}.self_attn.{part}_proj.{kind}") in own:
                        edit[name] = own[name][order]
        return edit

    def swapped(layers):
        edit = {}
        for layer in layers:
            gate, up = (f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up"))
            edit |= {gate: own[up].clone(), up: own[gate].clone()}
        return edit

    def layouts(layers, where):
        for text in orders:
            yield f"q_proj and k_proj of {where} have their rows {text}", rotary(layers, text)
        yield f"gate and up are swapped in {where}", swapped(layers)

    if before is not None:
        yield [("stale weights: every tensor is that of the version before", before)]
        if HEAD not in own:
            clause = "a stale tied head: the embedding is new, the head that of the version before"
            yield [(clause, {HEAD: before[EMBEDDING]})]
        one = "a partial update: {} is that of the version before"
        yield ((one.format(name), {name: before[name]}) for name in own)
    yield layouts(layers, "all layers")
    for layer in layers:
        yield layouts([layer], layer)
    square = {name: x for name, x in own.items() if x.ndim == 2 and x.shape[0] == x.shape[1]}
    yield ((f"{name} is transposed", {name: x.T.clone()}) for name, x in square.items())
    for scale in (0.0, 0.5, 2.0):
        clause = f"is scaled by {scale:g}" if scale else "is zero"
        yield ((f"{name} {clause}", {name: scale * x}) for name, x in own.items())


# ----------------------------------------------------------------------------------- the command
def parsed(arguments=None):
    from nanopost.cli import Parser, above

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the trainer's folder")
    add("--vllm", required=True, metavar="URL", help="the server")
    add("--before", help="folder of the weights before the last update")
    add("--after_update", metavar="CMD", help="a shell command that sends weights to the server")
    add("--chat_template", help="a Jinja file that replaces the model's own template")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: of the folder")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--vllm_timeout", type=above(0.0), default=600.0, help="seconds a request may take")
    return parser.parse_args(arguments)


class Command:
    """The comparisons of one folder and one server."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.tokenizer = Tokenizer.load(args.model, args.chat_template)
        self.server = Server(args.vllm, args.vllm_timeout)
        self.config = hf.read_config(args.model)
        try:
            (about, *_) = self.server.get("/v1/models")["data"]
        except ServerError as error:
            raise InputError(f"--vllm: {error}: is it up, and reachable from here?") from error
        self.name = about["id"]
        if self._paused():
            raise InputError(
                f"{args.vllm} is paused: a run is sending it weights, or died while it was: wait, "
                "or restart it."
            )
        positions = min(self.config.max_positions, about["max_model_len"])
        self.sequences = probes(self.tokenizer, self.config.vocab_size, positions)
        say(f"{args.vllm} serves {about.get('root') or self.name}, as {self.name}")

    def _paused(self) -> bool:
        try:
            return self.server.get("/is_paused")["is_paused"]
        except ServerError:  # a server without the routes for weights
            return False

    def load(self, folder):
        model = hf.load_model(folder, self.device)
        if model.config.vocab_size != self.config.vocab_size:
            raise InputError(
                f"{folder} has a vocabulary of {model.config.vocab_size} tokens and --model one of "
                f"{self.config.vocab_size}: give the same model before its update."
            )
        return model

    def audit(self, model, before) -> tuple[bool, "Answer"]:
        """Print the comparisons and the cause -> (whether all agree, the server's answer)."""
        args, server, config = self.args, self.server, self.config
        folder = model.config.dtype
        chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.dtype)
        dtype = chosen or (torch.float32 if folder == torch.float32 else torch.bfloat16)
        sequences = self.sequences
        try:
            answer = ask(server, sequences, config)
        except Refused as error:
            raise InputError(f"{error}: does it serve another model than --model?") from error
        except ServerError as error:
            raise InputError(f"--vllm: {error}.") from error
        self._check_shapes(answer, model)

        def score(sequences, temperature):
            total = sum(map(len, sequences))
            return logprobs(model, examples(sequences), total, temperature, self.device)

        def prints(state):
            return {name: print_of(x.to(dtype)) for name, x in state.items()}

        own = {name: x.detach() for name, x in model.state_dict().items()}
        more = {}
        if before is not None:
            with Edited(model).tensors(before):
                more = {"before": prints(before), "scores_before": score(sequences, 1.0)}
        kind = getattr(torch, answer.about.get("dtype", ""), dtype)
        digests = Digests.of(own.items(), kind)
        ours = ours_of(score, sequences, answer, prints(own), digests, **more)
        rows = compare(answer, ours, dtype)
        cause = ""
        if failed(rows):
            cause = why(answer, ours, dtype, config, own.items())
            if not cause and failed(rows[:1]):
                cause = self._search(model, answer, score, before, dtype)
        found = rows + [(what, 1.0 - same, 0.0) for what, same in self._texts().items()]
        if not failed(rows) and (row := self._defaults(model)):
            found.append(row)
        for what, number, limit in found:
            verdict = "agree" if number <= limit else "DIFFER"
            say(f"{what:52s} {number:10.2g}   limit {limit:7.1g}   {verdict}")
        if answer.prints is None:
            reason = "its weights are sharded" if answer.about else "no nanopost.vllm_worker"
            say(f"tensors, one by one: not compared ({reason})")
        bad = failed(found)
        if not bad:
            say("faithful: the server computes what the folder's weights say")
        elif cause or failed(rows):
            say(sentence(server.url, "", rows, cause))
        for what, *_ in failed(found[len(rows) :]):
            say(f"{server.url}: {self.reasons.get(what) or what}.")
        return not bad, answer

    reasons = {
        "text in token ids": "its tokenizer is another one than --model's",
        "messages in token ids": "its chat template is another one than --model's",
        "sampling without parameters": "it samples with the defaults of generation_config.json "
        "where a request gives none: start it with --generation-config vllm",
    }

    def _check_shapes(self, answer, model):
        for name, p in model.named_parameters():
            theirs = (answer.prints or {}).get(name)
            if theirs is None and answer.prints is not None:
                raise InputError(
                    f"{self.args.vllm} serves another model: --model has {name}, and it has not."
                )
            if theirs is not None and len(theirs) != len(p):
                raise InputError(
                    f"{name} has {len(p)} rows in --model and {len(theirs)} on the server: it "
                    "serves another model."
                )

    def _search(self, model, answer, score, before, dtype) -> str:
        def scores():
            return score(self.sequences, 1.0)

        if dtype == torch.float32:
            exact = scores()
            rounded = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
            with Edited(model).tensors(rounded):
                rounding = gap(scores(), exact)
            if gap(answer.scores, exact) <= 3 * rounding:
                return (
                    "low precision: the differences are of the size that rounding to bfloat16 makes"
                )
        return search(model, answer.scores, scores, before, SCORE[dtype])

    def _texts(self) -> dict[str, bool]:
        """Whether text and messages become the same token ids."""
        found = {}
        messages = [{"role": "user", "content": TEXT}]
        bodies = {
            "text in token ids": {"prompt": TEXT, "add_special_tokens": False},
            "messages in token ids": {"messages": messages, "add_generation_prompt": True},
        }
        for what, body in bodies.items():
            try:
                theirs = self.server.post("/tokenize", {"model": self.name, **body})["tokens"]
                is_text = "prompt" in body
                ids = (
                    self.tokenizer.encode(TEXT) if is_text else self.tokenizer.prompt_ids(messages)
                )
            except (ServerError, InputError) as error:  # no tokenizer or template on one side
                say(f"{what}: not compared ({error})")
                continue
            found[what] = theirs == list(ids)
        return found

    def _defaults(self, model):
        """Does the server sample as generation_config.json says if a request says nothing?

        By the likelihood ratio of what it samples: log q - log p, where q has the defaults and p is
        the whole distribution.
        """
        path = Path(self.args.model, "generation_config.json")
        given = hf.read_json(path) if path.is_file() else {}
        values = {
            "temperature": given.get("temperature") or 1.0,
            "top_k": given.get("top_k") or 0,
            "top_p": given.get("top_p") or 1.0,
            "min_p": given.get("min_p") or 0.0,
        }
        if values == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}:
            return None
        prompt = self.sequences[-1]
        body = {"model": self.name, "prompt": prompt, "n": 32, "max_tokens": SAMPLED, "seed": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        try:
            choices = self.server.post("/v1/completions", body)["choices"]
        except ServerError:
            return None
        ratio, start = 0.0, len(prompt)
        for choice in choices:
            ids = choice["token_ids"]
            logits_TV = all_logits(model, prompt + ids, self.device)[
                start - 1 : start + len(ids) - 1
            ]
            at_T = torch.arange(len(ids)), torch.tensor(ids)
            p_T = logits_TV.log_softmax(-1)[at_T]
            q_TV = (logits_TV / values["temperature"]).log_softmax(-1)
            q_T = cut(q_TV, values["top_k"], values["top_p"], values["min_p"])[at_T]
            ratio += float((q_T - p_T).sum())
        return "sampling without parameters", max(ratio, -99.0), 0.0


@torch.no_grad()
def all_logits(model, ids: list[int], device) -> torch.Tensor:
    """fp32 [T, V] of a model that is not sharded."""
    batch = batch_of(examples([ids]), device)
    about = (batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen)
    return model.logits(model.model.packed(*about)).float().cpu()


def main(arguments=None) -> int:
    """-> the exit status."""
    args = parsed(arguments)
    world = dist.init(args.device, "fp32")
    command = Command(args, world.device)
    before = None
    if args.before:
        before = command.load(args.before).state_dict()
    model = command.load(args.model)
    good, answer = command.audit(model, before)
    if args.after_update:
        before = {name: x.clone() for name, x in model.state_dict().items()}
        say(f"running {args.after_update}")
        status = subprocess.run(args.after_update, shell=True).returncode
        if status:
            raise InputError(f"--after_update: the command ended with status {status}.")
        model = command.load(args.model)
        good, later = command.audit(model, before)
        if all(map(np.array_equal, later.scores, answer.scores)):
            say("the command has not changed the server's log-probs at all")
        if all(torch.equal(x, before[name]) for name, x in model.state_dict().items()):
            say(f"the command has not changed the weights in {args.model}")
    dist.finish(int(not good))
    return int(not good)


if __name__ == "__main__":
    main()
