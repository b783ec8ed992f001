"""What a vLLM server computes with its weights, in a few numbers, and what the trainer computes.

Three comparisons. Scores: log-probs of fixed sequences, and of tokens that the server samples; if
it names the experts that its tokens took, the trainer takes the same (moe.py). Prints: each matrix
times a fixed vector, as the server computes it, whatever it has packed the weights into (needs a
server of nanopost.vllm_worker). Bytes: vLLM's own checksums.

Shapes: T tokens of a sequence, I inputs and O outputs of a matrix.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from nanopost.batch import Example
from nanopost.hf import EMBEDDING, HEAD
from nanopost.server import Refused, Server, ServerError, routes_of

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
CHANGED = 0.2  # largest share of named experts that our router would not take; rounding: a few %
INSIDE = "language_model."  # what vLLM's names of a decoder beside a vision tower begin with
NOTHING = hashlib.sha256(b"").hexdigest()  # the checksum of a packed layer on a CPU


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
    # key of DRAWN, or which probe -> Example.routes of it, where the server names experts
    routes: dict[str | int, np.ndarray] = field(default_factory=dict)


def ask(server: Server, sequences: list[list[int]], config) -> Answer:
    """Score sequences on a server, let it sample, and take its prints and checksums. ServerError if
    it fails."""
    tokens_route = _has(server, "/inference/v1/generate", {"token_ids": []})
    model = server.get("/v1/models")["data"][0]["id"]

    def complete(which, key, **sampling):
        """-> what the server says of the prompt, sampled ids, their log-probs. key: of routes."""
        ids = sequences[which]
        try:
            prompt, found, routes = request(ids, **sampling)
        except Refused as error:
            if "float values" not in str(error):
                raise
            return [{}] * len(ids), ([0] * SAMPLED, [np.nan] * SAMPLED)  # JSON has no nan
        if config.experts is not None and routes is not None:
            answer.routes[key] = routes_of(server.url, routes, len(ids) + len(found[0]), config)
        return prompt, found

    def request(ids, **sampling):
        sampling = {"n": 1, "temperature": 1.0, "logprobs": 0, "seed": 0, **sampling}
        if tokens_route:
            body = {"token_ids": ids, "sampling_params": sampling}
            said = server.post("/inference/v1/generate", body)
            (choice,) = said["choices"]
            content = choice["logprobs"]["content"]
            found = [x["token_id"] for x in content], [x["logprob"] for x in content]
            return said["prompt_logprobs"], found, choice.get("routed_experts")
        body = {"model": model, "prompt": ids, "return_token_ids": True, **sampling}
        choice = server.post("/v1/completions", body)["choices"][0]
        found = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        return choice["prompt_logprobs"], found, choice.get("routed_experts")

    def score(which):
        ids = sequences[which]
        prompt, _ = complete(which, which, max_tokens=1, prompt_logprobs=0)
        if not prompt or len(prompt) != len(ids):
            raise ServerError(f"{server.url}: no log-probs of a prompt's tokens")
        found = [0.0] + [prompt[t].get(str(ids[t]), {}).get("logprob") for t in range(1, len(ids))]
        return np.array([np.nan if x is None or x < -9000 else x for x in found], np.float32)

    def sample(name):
        which, top_p = DRAWN[name]
        sampling = {"temperature": TEMPERATURE, "top_p": top_p, "ignore_eos": True}
        _, (ids, logps) = complete(which, name, max_tokens=SAMPLED, **sampling)
        return ids, np.array(logps, np.float32)

    answer = Answer([], {})
    with ThreadPoolExecutor(len(sequences) + len(DRAWN)) as pool:
        scores = [pool.submit(score, which) for which in range(len(sequences))]
        sampled = {name: pool.submit(sample, name) for name in DRAWN}
        answer.scores = [task.result() for task in scores]
        answer.sampled = {name: task.result() for name, task in sampled.items()}
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


def has_print(tensor: torch.Tensor) -> bool:
    """Not experts, which are stacked, and convolutions."""
    return tensor.ndim <= 2


def prints_of(server: Server, config) -> tuple[dict | None, dict]:
    """A server's prints under checkpoint names, and how it computes; None if it gives none."""
    widths = {config.width, config.mlp_width, config.heads * config.head_dim}
    if config.delta:
        widths.add(config.delta.value_heads * config.delta.value_dim)
    if config.experts:
        widths.add(config.experts.shared)
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
        name.removeprefix(INSIDE): np.frombuffer(base64.b64decode(text), np.float32)
        for name, text in found.items()
    }
    return split(prints, config), about


def split(prints: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """vLLM's fused projections -> those of the checkpoint."""
    query = config.heads * config.head_dim * (2 if config.traits.gated_attention else 1)
    key = query + config.kv_heads * config.head_dim
    found = {}
    for name, x_O in prints.items():
        if ".qkv_proj." in name:
            for part, x in zip("qkv", np.split(x_O, [query, key])):
                found[name.replace("qkv_proj", f"{part}_proj")] = x
        elif ".in_proj_qkvz." in name:
            values = config.delta.value_heads * config.delta.value_dim
            found[name.replace("qkvz", "qkv")] = x_O[:-values]
            found[name.replace("qkvz", "z")] = x_O[-values:]
        elif ".in_proj_ba." in name:
            for part, x in zip("ba", np.split(x_O, 2)):
                found[name.replace("in_proj_ba", f"in_proj_{part}")] = x
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
    return [name for name in there if distance(engine[name], now[own_name(name, now)]) > limit]


def own_name(name, prints):
    return name if name in prints else EMBEDDING  # a tied head's


# -------------------------------------------------------------------------------------------- bytes
class Digests:
    """SHA-256 of weights as vLLM's /weight_checker gives them: projections fused, rows of the
    vocabulary padded with zeros to a multiple of 64."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.hashes = dtype, {}

    def add(self, name: str, tensor: torch.Tensor):
        """In the order of the checkpoint: q, k, v, and gate, up. vLLM has A_log in fp32, whatever
        the dtype of the others."""
        if name.endswith(".A_log"):
            return
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
    names = {key: key.rpartition(":")[2].removeprefix(INSIDE) for key in found}
    return {names[key]: h for key, h in found.items() if h != NOTHING}


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
    # Of the experts that the server names, the share that the router would not take.
    changed: float | None = None


def ours_of(score: Callable, sequences, answer: Answer, prints, digests, **before) -> Ours:
    """score(examples, temperature) -> fp32 [T] of each, by the trainer. Calls it twice."""
    prompts = {name: sequences[which] for name, (which, _) in DRAWN.items()}
    longer = {
        name: example(prompts[name] + ids, answer.routes.get(name))
        for name, (ids, _) in answer.sampled.items()
    }
    *scores, raw = score([*fixed(sequences, answer), longer[PLAIN]], 1.0)
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
    if ours.changed is not None:
        rows.append(("experts that the router would not take, share", ours.changed, CHANGED))
    if answer.prints is not None:
        there = [name for name in (*ours.prints, HEAD) if name in answer.prints]
        pairs = [(answer.prints[name], ours.prints[own_name(name, ours.prints)]) for name in there]
        worst = max(distance(x, y) for x, y in pairs)
        rows.append((f"{len(there)} tensors times a vector", worst, print_limit(answer, dtype)))
    covered = ours.digests.hashes.keys() & answer.checksums.keys()
    differ = differing(answer, ours)
    if covered and (answer.prints is not None or len(differ) < len(covered)):
        rows.append((f"{len(covered)} tensors' bytes (SHA-256)", float(len(differ)), 0.0))
    return rows


def differing(answer, ours) -> list[str]:
    """Tensors whose bytes differ, if both sides have the same precision."""
    if answer.about.get("dtype", "") not in str(ours.digests.dtype):
        return []
    return ours.digests.differ(answer.checksums)


def print_limit(answer, dtype) -> float:
    """Of the coarser precision of server and trainer."""
    full = answer.about.get("dtype") == "float32" and dtype == torch.float32
    return PRINT[torch.float32 if full else torch.bfloat16]


def failed(rows) -> list[tuple[str, float, float]]:
    return [row for row in rows if not row[1] <= row[2]]  # nan too


def fixed(sequences, answer: Answer) -> list[Example]:
    """The probes, with the experts that the server took."""
    found = []
    for which, ids in enumerate(sequences):
        routes = answer.routes.get(which)
        found.append(example(ids, None if routes is None else routes[: len(ids)]))
    return found


def example(ids, routes=None) -> Example:
    return Example(ids, np.arange(len(ids)) > 0, routes=routes)
