"""A teacher as train_distill.py uses it: teacher(batch, temperature) is what the student's forward
pass computes in its head, log-probs, entropies and the divergence from the teacher.

Shapes: N packed tokens, M of them with a target, K of the teacher's tokens, D and E widths of
student and teacher, V vocabulary.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanopost import InputError, StepError, dist
from nanopost.batch import Batch, Example
from nanopost.divergence import from_log_probs, from_teacher
from nanopost.server import WRONG, Refused, Server, ServerError, as_server_error

REQUESTS = 32  # in flight, of a rank
# Read by both tokenizers, to compare them.
TEXT = "  It costs $3.50 (100%), isn't 12+34 or Ünïcode?\n\tdef f(x): return x"


class Teacher:
    """A frozen model, of any size, over the student's vocabulary."""

    def __init__(self, model, vocabulary: int, dtype, beta: float, top_k: int):
        """vocabulary: of the student. dtype: of what computes. beta, top_k: see
        divergence.from_teacher. A collective."""
        self.model = model.requires_grad_(False)
        self.max_positions = model.config.max_positions
        weight_VE = dist.full_tensor(model.head_weight)
        device = getattr(model, "runs_on", weight_VE.device)  # with --offload it is held elsewhere
        self.weight_VE = weight_VE.to(device, dtype)[:vocabulary]
        self.beta, self.top_k = beta, top_k
        if len(self.weight_VE) < vocabulary:
            raise InputError(
                f"the teacher {model.folder} has {len(self.weight_VE):,} tokens and the student "
                f"{vocabulary:,}: take a teacher that has as many, or more."
            )

    def __call__(self, batch: Batch, temperature: float):
        """-> head(hidden_MD, weight_VD) -> (logp_N, entropy_N, divergence_N), 0 where there is no
        target. temperature: divides the logits of both. A collective."""
        with torch.no_grad():
            teacher_hidden_ME = self.model(batch, head=lambda hidden_ME, weight_VE: hidden_ME)

        def head(hidden_MD, weight_VD):
            found_M = from_teacher(
                hidden_MD,
                weight_VD,
                batch.target_N[batch.at_M],
                temperature,
                teacher_hidden_ME,
                self.weight_VE,
                self.beta,
                self.top_k,
            )
            return tuple(map(batch.spread, found_M))

        return head


class ServedTeacher:
    """A teacher on vLLM servers, which give its top_k likeliest tokens at each place; the rest are
    one. Any vLLM server will do: `vllm serve DIR --max-logprobs K`."""

    def __init__(
        self, urls: list[str], tokenizer, vocabulary: int, timeout: float, beta: float, top_k: int
    ):
        """timeout: seconds that a request may take. InputError if a server is not there, reads text
        differently, or does not give that many log-probs."""
        self.servers = [Server(url, timeout, "--teacher") for url in dict.fromkeys(urls)]
        self.beta, self.top_k, self.vocabulary = beta, top_k, vocabulary
        self.names, self.max_positions = {}, 2**31
        ids = tokenizer.encode(TEXT)
        for server in self.servers:
            try:
                served = server.get("/v1/models")["data"][0]
                self.names[server] = served["id"]
                self.max_positions = min(self.max_positions, served["max_model_len"] - 1)
                body = {"prompt": TEXT, "add_special_tokens": False}
                theirs = server.post("/tokenize", {"model": self.names[server], **body})["tokens"]
                self._judge(server, Example(ids, [True] * len(ids)))
            except Refused as error:
                raise InputError(
                    f"--teacher: {error}: start the server with --max-logprobs {top_k} or more, or "
                    "lower --teacher_top_k."
                ) from error
            except (ServerError, *WRONG) as error:
                raise InputError(
                    f"--teacher: {as_server_error(server, error)}: is it up, and is it vLLM "
                    "(vllm serve DIR)?"
                ) from error
            if theirs != ids:
                raise InputError(
                    f"--teacher {server.url}: its tokenizer is not the student's, so it reads "
                    "different text: serve a model that has the same."
                )

    def __call__(self, batch: Batch, temperature: float):
        """As Teacher's, at temperature 1. StepError if a server fails."""
        if temperature != 1:
            raise ValueError(f"a server tells of temperature 1, not {temperature}")
        asked = [
            (self.servers[i % len(self.servers)], e)
            for i, e in enumerate(batch.examples)
            if e.num_targets
        ]
        found = [(np.zeros((0, self.top_k), np.int64), np.zeros((0, self.top_k), np.float32))]
        with ThreadPoolExecutor(REQUESTS) as pool:
            try:
                found += pool.map(lambda pair: self._judge(*pair), asked)
            except ServerError as error:
                raise StepError(
                    f"the teacher's server {error}; no other takes over: see to it, then --resume."
                ) from error
        id_MK, logp_MK = [
            torch.from_numpy(np.concatenate(x)).to(batch.token_N.device) for x in zip(*found)
        ]

        def head(hidden_MD, weight_VD):
            target_M = batch.target_N[batch.at_M]
            found_M = from_log_probs(hidden_MD, weight_VD, target_M, 1.0, id_MK, logp_MK, self.beta)
            return tuple(map(batch.spread, found_M))

        return head

    def _judge(self, server, e: Example) -> tuple[np.ndarray, np.ndarray]:
        """-> the teacher's likeliest tokens at each target of an example, int64 [M, K], and their
        log-probs, fp32."""
        body = {
            "model": self.names[server],
            "prompt": e.ids.tolist(),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": self.top_k,
        }
        try:
            (choice,) = server.post("/v1/completions", body, again=True)["choices"]
            places = choice["prompt_logprobs"]
            if len(places) != len(e):
                raise ServerError(f"{server.url}: {len(places)} log-probs of {len(e)} tokens")
            ids, logps = [], []
            for t in filter(None, e.mask.nonzero()[0]):  # the first token is no target
                ranked = sorted((x["rank"], int(v), x["logprob"]) for v, x in places[t].items())
                ids.append([v for _, v, _ in ranked[: self.top_k]])
                logps.append([logp for *_, logp in ranked[: self.top_k]])
            shape = e.num_targets, self.top_k
            ids, logps = np.array(ids, np.int64), np.array(logps, np.float32)
            if ids.shape != shape or ids.max() >= self.vocabulary:
                raise ServerError(f"{server.url}: not {self.top_k} of the student's tokens")
        except WRONG as error:
            raise as_server_error(server, error) from error
        return ids, logps
