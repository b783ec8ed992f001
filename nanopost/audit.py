"""python -m nanopost.audit: does a vLLM server compute what the trainer's weights say? If not, why?

    --model DIR --vllm URL                     a trainer's folder beside a server, anybody's
    --model DIR --vllm URL --before DIR        and the weights before the last update
    --model DIR --vllm URL --after_update CMD  audit, run CMD, which has the trainer send weights to
                                               the server, and audit again

It prints a line for each comparison, and exits with 1 if one fails. A run with --vllm does the same
after a sync (--audit_every), and stops with one sentence.

probe.py has the comparisons: log-probs with any server that has vLLM's OpenAI routes, tensors with
one of nanopost.vllm_worker, bytes with one that runs under VLLM_SERVER_DEV_MODE=1. attribution.py
has the causes: one is named only if it reproduces the server's numbers.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nanopost import InputError, StepError, dist, hf, moe
from nanopost.attribution import Edited, search, why
from nanopost.batch import batch_of
from nanopost.engine import cut
from nanopost.forward import logprobs
from nanopost.probe import (
    SAMPLED,
    SCORE,
    Answer,
    Digests,
    Ours,
    ask,
    compare,
    example,
    failed,
    fixed,
    gap,
    has_print,
    ours_of,
    print_of,
    probes,
)
from nanopost.server import WRONG, Refused, Server, ServerError, as_server_error
from nanopost.storage import read_json
from nanopost.terminal import say
from nanopost.tokenizer import Tokenizer

TEXT = "12+34=? Grüße,  東京\n\tdef f(x): return x_1"


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
        self.prints, self.before, self.scores = {}, None, {}
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
            if self.every and has_print(tensor):
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
                answers[server.url] = as_server_error(server, error)
        (answers,) = dist.gather([answers] if self.world.rank == 0 else [])
        scored, self.scores = self.scores, {}
        for url, answer in answers.items():
            if isinstance(answer, InputError):
                raise answer
            if isinstance(answer, ServerError):
                if self.world.rank == 0:
                    say(f"warning: not audited: {answer}")
                continue
            given = self._score, self.sequences, answer, self.prints, self.digests
            scores = scored.get(url) if self.every == 1 else None  # of the sync before
            ours = ours_with(self.model, *given, before=self.before, scores_before=scores)
            self.scores[url] = ours.scores
            rows = compare(answer, ours, self.world.dtype)
            if dist.all_max(bool(failed(rows)))[0]:
                weights = iter(dist.full_weights(self.model, self.part))
                cause = why(answer, ours, self.world.dtype, self.config, weights)
                for _ in weights:  # a collective, which `why` may not have needed
                    pass
                causes = dist.gather([sentence(url, f"step {version}: ", rows, cause)])
                raise StepError(causes[0])

    def _score(self, examples, temperature):
        tokens = sum(map(len, examples))
        return logprobs(self.model, examples, tokens, temperature, self.world.device)

    def _check_tokenizer(self, server):
        if server.url not in self.known:
            if not same_text(server, self.tokenizer):
                raise InputError(
                    f"{server.url} has another tokenizer than --model: start it with that model's "
                    "folder."
                )
            self.known.add(server.url)


def same_text(server: Server, tokenizer) -> bool:
    """Whether text has the same token ids there; also if the server encodes none."""
    model = server.get("/v1/models")["data"][0]["id"]
    try:
        body = {"model": model, "prompt": TEXT, "add_special_tokens": False}
        return server.post("/tokenize", body)["tokens"] == list(tokenizer.encode(TEXT))
    except ServerError:
        return True


def ours_with(model, *given, **before) -> Ours:
    """ours_of, and which share of the experts that the server names the model would not take. A
    collective: each rank scores a part."""
    with moe.counted(model) as counts:
        ours = ours_of(*given, **before)
    changed, named = dist.all_sums(*counts)
    if named:
        ours.changed = changed / named
    return ours


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
    add(
        "--dtype",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="auto: fp32 if folder or server is",
    )
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
        model.model.replays = True  # the experts that the server names
        return model

    def audit(self, model, before) -> tuple[bool, Answer]:
        """Print the comparisons and the cause -> (whether all agree, the server's answer)."""
        args, server, config = self.args, self.server, self.config
        sequences = self.sequences
        try:
            answer = ask(server, sequences, config)
        except Refused as error:
            raise InputError(f"{error}: does it serve another model than --model?") from error
        except ServerError as error:
            raise InputError(f"--vllm: {error}.") from error
        self._check_shapes(answer, model)
        # Weights in bf16, computed with in fp32 on both sides, allow no more than fp32 does.
        full = torch.float32 in (model.config.dtype, self._dtype_of(answer))
        chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.dtype)
        dtype = chosen or (torch.float32 if full else torch.bfloat16)

        def score(examples, temperature):
            tokens = sum(map(len, examples))
            return logprobs(model, examples, tokens, temperature, self.device)

        def prints(state):
            return {n: print_of(x.to(dtype)) for n, x in state.items() if has_print(x)}

        own = {name: x.detach() for name, x in model.state_dict().items()}
        more = {}
        if before is not None:
            with Edited(model).tensors(before):
                more = {
                    "before": prints(before),
                    "scores_before": score(fixed(sequences, answer), 1.0),
                }
        kind = self._dtype_of(answer) or dtype
        digests = Digests.of(own.items(), kind)
        ours = ours_with(model, score, sequences, answer, prints(own), digests, **more)
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

    def _dtype_of(self, answer) -> torch.dtype | None:
        """In which the server computes, if it says so."""
        return getattr(torch, answer.about.get("dtype", ""), None)

    def _check_shapes(self, answer, model):
        if answer.prints is None:
            return
        kinds = {_kind(name) for name in answer.prints}
        # A server gives no prints of some kinds of tensors in mixtures and linear attention.
        dense = self.config.experts is None and self.config.delta is None
        for name, p in model.named_parameters():
            theirs = answer.prints.get(name)
            if theirs is None and (dense or _kind(name) in kinds):
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
            return score(fixed(self.sequences, answer), 1.0)

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
        given = read_json(path) if path.is_file() else {}
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


def _kind(name) -> tuple[str, ...]:
    """Of a tensor, whatever its layer: q_proj.weight."""
    return tuple(name.split(".")[-2:])


@torch.no_grad()
def all_logits(model, ids: list[int], device) -> torch.Tensor:
    """fp32 [T, V] of a model that is not sharded."""
    batch = batch_of([example(ids)], device)
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
