"""A teacher in the student's forward pass: what it gives at each target is what both models say of
that sequence alone, whatever is packed beside it or shared."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from small import random_ids, small_model

from nanopost import InputError, StepError
from nanopost.batch import Example, batch_of
from nanopost.divergence import divergence, with_rest
from nanopost.teacher import ServedTeacher, Teacher

VOCABULARY, TEMPERATURE = 61, 0.8


@pytest.fixture(scope="module")
def models():
    wide = {"hidden_size": 48, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": 64}
    return small_model(0), small_model(1, **wide)


def group(prompt, *lengths, seed=0):
    """Completions of one prompt; the first token of each completion is not trained."""
    start = random_ids(prompt, 50 + seed)
    ids = [[*start, *random_ids(n, 10 * seed + i)] for i, n in enumerate(lengths)]
    return [Example(x, np.arange(len(x)) > prompt) for x in ids]


def logits(model, ids):
    cu = torch.tensor([0, len(ids)], dtype=torch.int32)
    hidden = model.model.packed(torch.tensor(ids), torch.arange(len(ids)), cu, len(ids))
    return model.logits(hidden)[:, :VOCABULARY].double() / TEMPERATURE


@torch.no_grad()
def alone(student, teacher, e, beta, top_k):
    """Log-prob, entropy and divergence at the tokens of one sequence, from whole logits."""
    found = torch.zeros(3, len(e), dtype=torch.float64)
    p, q = (logits(model, e.ids.tolist()).log_softmax(-1) for model in (student, teacher))
    for t in e.mask.nonzero()[0]:
        p_t, q_t = p[t - 1 : t], q[t - 1 : t]
        pair = p_t, q_t
        if top_k:
            pair = [with_rest(x, q_t.topk(top_k).indices) for x in (p_t, q_t)]
        entropy = -(p_t.exp() * p_t).sum()
        found[:, t] = torch.stack([p_t[0, e.ids[t]], entropy, divergence(*pair, beta)[0]])
    return found


@pytest.mark.parametrize("beta, top_k", [(1.0, 0), (0.0, 5), (0.4, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_each_sequence_gets_what_it_would_get_alone(models, beta, top_k, shared):
    student, teacher = models
    examples = group(6, 4, 9, 3) if shared else [*group(6, 4), *group(2, 8, seed=1)]
    batch = batch_of(examples)
    assert (batch.prefixes is not None) == shared
    judge = Teacher(teacher, VOCABULARY, torch.float32, beta, top_k)
    found = [batch.split(x.detach()) for x in student(batch, head=judge(batch, TEMPERATURE))]
    for s, e in enumerate(examples):
        expected = alone(student, teacher, e, beta, top_k)
        ours = torch.from_numpy(np.stack([x[s] for x in found])).double()
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_the_teacher_gets_no_gradient_and_the_student_all_of_its_own(models):
    student, teacher = models
    judge = Teacher(teacher, VOCABULARY, torch.float32, 1.0, 0)
    batch = batch_of(group(3, 4))
    student(batch, head=judge(batch, TEMPERATURE))[2].sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    student.zero_grad(set_to_none=True)


def test_a_dummy_has_nothing_to_learn_and_a_gradient_for_each_parameter(models):
    student, teacher = models
    judge = Teacher(teacher, VOCABULARY, torch.float32, 0.5, 0)
    batch = batch_of([])
    found = student(batch, head=judge(batch, TEMPERATURE))
    assert all(x.shape == (2,) and not x.any() for x in found)
    found[2].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())
    student.zero_grad(set_to_none=True)


def test_a_teacher_of_fewer_tokens_is_refused():
    with pytest.raises(InputError, match="has 61 tokens and the student 64: take a teacher"):
        Teacher(small_model(), 64, torch.float32, 1.0, 0)


# ------------------------------------------------------------------------------------- on a server
class Words:
    """A tokenizer as far as a teacher asks for one."""

    def encode(self, text):
        return [ord(letter) % VOCABULARY for letter in text]


class Handler(BaseHTTPRequestHandler):
    """The routes of vLLM's server that a teacher uses, over a model of ours. Whether vLLM's own
    answers are like these, test_vllm_scripts.py tells."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": "served", "max_model_len": 40}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(self.path)
        if self.path == "/tokenize":
            return self.answer(200, {"tokens": self.server.words.encode(asked["prompt"])})
        if self.server.broken:
            return self.answer(500, {"message": "engine dead"})
        if asked["prompt_logprobs"] > 20:
            return self.answer(400, {"message": "at most 20 log-probs"})
        places = [None]
        with torch.no_grad():
            logps = (logits(self.server.model, asked["prompt"]) * TEMPERATURE).log_softmax(-1)
        for t in range(1, len(asked["prompt"])):
            order = logps[t - 1].argsort(descending=True).tolist()
            told = {
                order.index(v) + 1: v
                for v in (asked["prompt"][t], *order[: asked["prompt_logprobs"]])
            }
            places.append(
                {
                    str(v): {"rank": rank, "logprob": float(logps[t - 1, v])}
                    for rank, v in told.items()
                }
            )
        self.answer(200, {"choices": [{"prompt_logprobs": places}]})

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def servers(models):
    """Two servers of the teacher."""
    running = []
    for _ in range(2):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.model, server.words, server.broken, server.asked = models[1], Words(), False, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
    yield running
    for server in running:
        server.shutdown()
        server.server_close()


def addresses(servers):
    return [f"http://127.0.0.1:{server.server_port}" for server in servers]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_on_servers_it_is_the_teacher_that_they_serve(models, servers, beta):
    student, teacher = models
    examples = [*group(6, 4, 9, 3), *group(2, 8, seed=1)]
    served = ServedTeacher(addresses(servers), Words(), VOCABULARY, 20.0, beta, 5)
    native = Teacher(teacher, VOCABULARY, torch.float32, beta, 5)
    batch = batch_of(examples)
    for a, b in zip(*(student(batch, head=judge(batch, 1.0)) for judge in (served, native))):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    assert served.max_positions == 39
    assert all(server.asked.count("/v1/completions") == 1 + 2 for server in servers)
    dummy = batch_of([])
    assert not student(dummy, head=served(dummy, 1.0))[2].any()


def test_what_a_served_teacher_cannot_do_is_one_sentence(models, servers):
    def begin(words=None, top_k=5, urls=None):
        urls = urls or addresses(servers)
        return ServedTeacher(urls, words or Words(), VOCABULARY, 5.0, 1.0, top_k)

    class Others(Words):
        def encode(self, text):
            return [0, *super().encode(text)]

    with pytest.raises(InputError, match="start the server with --max-logprobs 21 or more"):
        begin(top_k=21)
    with pytest.raises(InputError, match="its tokenizer is not the student's"):
        begin(words=Others())
    with pytest.raises(InputError, match="--teacher nowhere/at/all: give an address"):
        begin(urls=["nowhere/at/all"])
    with pytest.raises(InputError, match="is it up"):
        begin(urls=["http://127.0.0.1:9"])
    served = begin()
    servers[1].broken = True
    with pytest.raises(StepError, match="500: engine dead; no other takes over: see to it"):
        served(batch_of(group(6, 4, 9)), 1.0)
