"""Rollouts on vLLM servers: the calls of engine.py, over HTTP.

Token ids go out, token ids and log-probs come back, by vLLM's /inference/v1/generate. Start a
server, here or elsewhere, with `python -m nanopost.vllm_worker --model DIR --port 8000`.

A prompt's samples come from one server, the one with the fewest requests. A server that fails is
left out, and what it had is sent again to the others; it is back after the next sync of weights
that reaches it. Every call has a time-out. Without a server generate ends the run.

A sync: pause, start, one update per bucket of weights, finish with a version, resume. Each sampled
token knows the version it was drawn with, so a server with other weights is noticed. A server that
fails in a sync stays paused until a whole one succeeds; if the trainer dies, see --max_pause in
vllm_worker.py.
"""

import os
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

import numpy as np
import torch
from safetensors.torch import save

from nanopost import InputError, StepError, dist
from nanopost.engine import Sampling
from nanopost.rollout import Rollout
from nanopost.server import (
    MINE,
    QUICK,
    WRONG,
    Refused,
    Server,
    ServerError,
    as_server_error,
    is_over,
    routes_of,
)
from nanopost.terminal import say

BUCKET = 2**28  # bytes of weights in one update
REQUESTS = 256  # in flight from one rank
TRIES = 3  # of one prompt on each server
SIZES = (  # of a model, under their names in config.json
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


# ------------------------------------------------------------------------------------------- engine
class Servers:
    """The engine on one or more vLLM servers. Each rank has one; rank 0 syncs the weights."""

    def __init__(
        self, urls: list[str], tokenizer, world, config, timeout: float = 600.0, audit=None
    ):
        """config: the model's. timeout: seconds that any request may take. audit: audit.Audit."""
        self.audit = audit
        self.servers = [Server(url, timeout) for url in dict.fromkeys(urls)]
        self.tokenizer, self.world, self.config = tokenizer, world, config
        self.warned = False  # whether it was said that a server names no experts
        self.stop_ids = sorted(tokenizer.stop_ids)
        self.transport = (Nccl if world.device.type == "cuda" else SharedMemory)()
        self.lock = threading.Lock()
        self.syncing = threading.Lock()  # held by a sync, and by who judges a server
        self.version = 0
        # Weights of other runs, or those that a server has started with, have other names.
        self.run = dist.gather([secrets.token_hex(4)])[0]
        limits = [self._ready(server, config) for server in self.servers]
        self.positions = min(config.max_positions, *limits)
        if audit:
            audit.fit(self.positions)
        say(f"{len(self.servers)} vLLM servers sample: {' '.join(s.url for s in self.servers)}")
        # Why a server is left out. The others have the weights of the last sync.
        self.lost = {server.url: f"{server.url}: not synced yet" for server in self.servers}
        self.marks = {}  # the version of a server whose update has not ended

    @property
    def alive(self) -> list[Server]:
        return [server for server in self.servers if server.url not in self.lost]

    def _ready(self, server, config) -> int:
        """InputError unless the server is one to train with -> tokens that it takes at most."""
        start = "start it with python -m nanopost.vllm_worker --model DIR --port PORT."
        try:
            server.get("/weight_info")
            limit = min(model["max_model_len"] for model in server.get("/v1/models")["data"])
        except (ServerError, *WRONG) as error:
            error = as_server_error(server, error)
            if "status 40" in str(error):
                raise InputError(
                    f"--vllm {server.url} answers, but is no server to train with: {start}"
                ) from error
            raise InputError(
                f"--vllm: {error}: is it up (loading takes a minute), and reachable from here? "
                f"Else {start}"
            ) from error
        sizes = {}
        try:
            answer = server.post(
                "/collective_rpc", {"method": "nanopost_sizes", "args": [SIZES]}, QUICK
            )
            sizes = answer["results"][0]
            probe = {"token_ids": [0], "sampling_params": {"max_tokens": 1}}
            if not server.get("/is_paused")["is_paused"]:  # as a dead run may have left it
                server.post("/inference/v1/generate", probe, min(server.timeout, 60.0))
        except (ServerError, *WRONG) as error:
            error = as_server_error(server, error)
            raise InputError(f"{error}: this server has no routes for training: {start}") from error
        for name in SIZES:
            ours, theirs = config.text.get(name), sizes.get(name)
            if None not in (ours, theirs) and ours != theirs:
                raise InputError(
                    f"--vllm {server.url} serves another model: its {name} is {theirs}, not {ours} "
                    "as in --model: start it with the folder of --model."
                )
        return limit

    # ------------------------------------------------------------------------------------- generate
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Rollout]]:
        """n rollouts of each prompt (token ids). Sample i of prompt p draws from seed seeds[p] + i.

        InputError for what Engine.generate refuses too; StepError if no server is left.
        """
        lengths = [len(prompt) for prompt in prompts]
        if 0 in lengths:
            raise InputError(f"prompt {lengths.index(0)} has no tokens to continue from.")
        if "" in sampling.stop:
            raise InputError("--stop: an empty string would end every completion at once.")
        longest = max(lengths, default=0)
        # vLLM would sample fewer, and not say so.
        if longest + sampling.max_tokens > self.positions:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_tokens} new ones exceed the "
                f"{self.positions} positions of model and server: lower --max_new_tokens, drop "
                "long prompts, or start the server with a larger --max-model-len."
            )
        seeds = seeds or [0] * len(prompts)
        if not prompts:
            return []
        return self._at_once(
            [
                partial(self._group, prompt, n, sampling, seed)
                for prompt, seed in zip(prompts, seeds)
            ]
        )

    def _at_once(self, calls: list[Callable]) -> list:
        """What the calls return. If one raises, or Ctrl-C does, all requests are ended."""
        ended = threading.Event()
        begin = partial(setattr, MINE, "ended", ended)
        pool = ThreadPoolExecutor(min(len(calls), REQUESTS), initializer=begin)
        try:
            tasks = [pool.submit(call) for call in calls]
            for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                task.result()
            return [task.result() for task in tasks]
        except BaseException:
            ended.set()
            for server in self.servers:
                server.hang_up(ended)
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            pool.shutdown(wait=False)

    def _group(self, prompt, n, sampling, seed) -> list[Rollout]:
        """The samples of one prompt, from one server; from another one if that fails."""
        body = {
            "token_ids": list(map(int, prompt)),
            "sampling_params": {
                "n": n,
                "seed": int(seed),
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "logprobs": 0,  # of the sampled token alone
                "stop_token_ids": self.stop_ids,
                "ignore_eos": True,  # stop_token_ids say what ends a completion
                "stop": list(sampling.stop),
                "detokenize": bool(sampling.stop),
                "skip_special_tokens": False,
            },
        }
        failures = Counter()  # of this prompt, by server
        while True:
            server = self._least_loaded(failures)
            before = self.version
            try:
                answer = server.post("/inference/v1/generate", body, again=True)
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                if [choice["index"] for choice in choices] != list(range(n)):
                    raise ServerError(f"{server.url}: {len(choices)} samples instead of {n}")
                return [self._rollout(server, prompt, c, sampling, before) for c in choices]
            except Refused as error:
                raise InputError(f"{error}.") from error
            except (ServerError, *WRONG) as error:
                if server.closed or is_over():
                    raise
                failures[server] += 1
                self._doubt(server, as_server_error(server, error), failures[server])
            finally:
                with self.lock:
                    server.load -= 1

    def _least_loaded(self, failures) -> Server:
        with self.lock:
            alive = self.alive
            if not alive:
                urls = " ".join(server.url for server in self.servers)
                reasons = "; ".join(self.lost.values())
                raise StepError(
                    f"no server of --vllm {urls} is left ({reasons}): restart them, or end another "
                    "run that trains with them, and continue with --resume."
                )
            # Ranks count only their own requests, so each begins with another server.
            first = self.world.rank % len(alive)
            order = alive[first:] + alive[:first]
            server = min(order, key=lambda server: (failures[server], server.load))
            server.load += 1
            return server

    def _doubt(self, server, error, times):
        """After a failed request: leave the server out unless it is sound, and ask it again."""
        with self.syncing:  # what a server says during a sync means nothing
            if server.url in self.lost:
                return
            try:
                version = server.get("/weight_info")["weight_version"]
                if server.get("/is_paused")["is_paused"]:
                    reason = "it is paused, by somebody else"
                elif version != self._name(self.version):
                    reason = f"its weights are {version!r}, not {self._name(self.version)!r}"
                elif times == TRIES:
                    reason = f"this prompt has failed {times} times"
                else:
                    reason = None
            except (ServerError, *WRONG) as silence:
                reason = str(as_server_error(server, silence))
            if server.closed or is_over():
                return
            if reason is not None:
                with self.lock:
                    self.lost[server.url] = f"{error}; {reason}"
                say(f"warning: {error}; left out until the next sync: {reason}")
                server.hang_up()  # what else it was asked for goes to the others
                return
        say(f"warning: {error}; it is asked again")
        MINE.ended.wait(times - 1)  # seconds

    def _rollout(self, server, prompt, choice, sampling, before) -> Rollout:
        """One choice of an answer, checked."""
        ids = choice["token_ids"]
        finish = choice["finish_reason"]
        if finish not in ("stop", "length"):  # aborted, say by a pause
            raise ServerError(f"{server.url}: a completion ended by {finish!r}")
        content = choice["logprobs"]["content"]
        logp = np.array([x["logprob"] for x in content], np.float32)
        if [x["token_id"] for x in content] != ids:
            raise ServerError(f"{server.url}: log-probs of other tokens than the sampled ones")
        if (logp < -9000).any() or not np.isfinite(logp).all():  # -9999: vLLM's "not there"
            raise ServerError(f"{server.url}: a log-prob is missing")
        if not ids:
            raise ServerError(f"{server.url}: a completion without tokens")
        if sampling.temperature == 0:
            logp = np.zeros_like(logp)
        versions = np.full(len(ids), -1)
        for span in choice["weight_versions"] or []:
            run, _, version = span["version"].partition(":")
            if run != self.run or int(version) < before:
                raise ServerError(
                    f"{server.url}: sampled with weights {span['version']!r}, not "
                    f"{self._name(before)!r}: it has restarted, or another run trains with it"
                )
            versions[span["start"] : span["end"]] = int(version)
        if (versions < 0).any():
            raise ServerError(f"{server.url}: tokens without a weight version")
        kept = None
        if sampling.kept and sampling.cuts:
            if choice["sampling_mask"] is None:
                raise Refused(
                    f"{server.url} does not say what top-k, top-p or min-p kept, which the trainer "
                    "must know: start it with --return-sampling-mask (GPUs only), or sample with "
                    "nanopost's own engine"
                )
            kept = [np.array(sorted(ids), np.int32) for ids in choice["sampling_mask"]]
        routes = None
        if self.config.experts is not None:
            routes = self._routes(server, choice, len(prompt) + len(ids))
        return Rollout(prompt, ids, logp, finish, versions, kept=kept, routes=routes)

    def _routes(self, server, choice, tokens) -> np.ndarray | None:
        """Rollout.routes of one choice; None, which is said once, if the server names no experts.

        tokens: of prompt and completion.
        """
        if choice.get("routed_experts") is None:
            if not self.warned:
                say(
                    f"warning: {server.url} does not name the experts that its tokens took, so the "
                    "trainer chooses its own (no router replay): start it with "
                    "--enable-return-routed-experts (GPUs only), or sample with nanopost's own "
                    "engine"
                )
            self.warned = True
            return None
        return routes_of(server.url, choice["routed_experts"], tokens, self.config)

    # ----------------------------------------------------------------------------------------- sync
    def _name(self, version: int) -> str:
        return f"{self.run}:{version}"

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int):
        """Bring full weights to every server that answers, under the names of the model's folder.

        A collective: every rank iterates over the tensors, rank 0 sends them; a second time if no
        server has them and the iterable allows it. Requests that run ahead go on under the new
        weights, their cache recomputed. Without a server the next generate raises StepError.
        """
        watched = named_tensors
        if self.audit:
            watched = self.audit.watch(named_tensors)
        with self.syncing:
            self._sync(watched, version)
            if not self.alive and iter(named_tensors) is not named_tensors:
                self._sync(named_tensors, version)
            alive = self.alive  # the same on all ranks, until one doubts a server
        if self.audit and alive:
            self.audit.check(alive, version)

    def _sync(self, named_tensors, version):
        lost = {}
        for url, reason in dist.gather([*self.lost.items()]):
            if url not in lost and url not in self.lost:
                say(f"warning: another rank has left out a server: {reason}")
            lost.setdefault(url, reason)
        sound, errors = [], {}
        if self.world.rank == 0:
            sound = self._each(self.servers, errors, lambda s: self._begin(s, s.url in lost))
        for bucket in _buckets(self.config.form.published(named_tensors), self.world):
            if self.world.rank == 0:
                sound = self.transport.send(self, sound, errors, bucket)
        if self.world.rank == 0:
            sound = self._each(sound, errors, lambda s: self._end(s, version))
        with self.lock:
            self.version = version
            self.lost = dict(dist.gather([*errors.items()]))
        for server in self.servers:
            if server.url in self.lost:
                server.hang_up()

    def _each(self, servers, errors, do) -> list[Server]:
        """do(server) for all at once -> those that did not fail; the others' reasons to errors."""

        def attempt(server):
            try:
                do(server)
            except (ServerError, *WRONG) as error:
                # An update that has not ended leaves it without weights: it stays paused.
                reason = errors[server.url] = str(as_server_error(server, error))
                if reason != self.lost.get(server.url):  # said at the sync before
                    say(f"warning: not synced: {reason}")

        if servers:
            self._at_once([partial(attempt, server) for server in servers])
        return [server for server in servers if server.url not in errors]

    def _begin(self, server, fresh):
        # What a server does for others, or for a trainer that died, ends; our own goes on.
        if fresh:
            server.get("/weight_info")  # a server that hangs must not take longer in each sync
        mode = "abort" if fresh else "keep"
        server.post(f"/pause?mode={mode}", timeout=min(server.timeout, 60.0))
        # Not the version before: half-loaded weights must not pass for it.
        mark = self.marks[server.url] = f"{self.run}:syncing-{secrets.token_hex(4)}"
        server.post("/update_weight_version", {"new_version": mark})
        if fresh:
            server.post("/collective_rpc", {"method": "nanopost_abandon"})
            self.transport.connect(server)
        server.post("/start_weight_update")

    def _update(self, server, info):
        self._check_mark(server)
        server.post("/update_weights", {"update_info": info})

    def _check_mark(self, server):
        """ServerError if another trainer has begun a sync meanwhile: its weights would mix."""
        version = server.get("/weight_info")["weight_version"]
        if version != self.marks[server.url]:
            raise ServerError(
                f"{server.url}: {version!r} was begun in the middle of a sync: it has restarted, "
                "or another run trains with it"
            )

    def _end(self, server, version):
        self._check_mark(server)
        server.post("/finish_weight_update", {"weight_version": self._name(version)})
        # Keys and values of the weights before: running requests compute theirs again.
        server.post("/reset_prefix_cache?reset_running_requests=true")
        server.post("/resume")

    def sleep(self):
        """Their memory is not the trainer's."""

    def close(self):
        """Leave the servers as they are, with the weights of the last sync."""
        for server in self.servers:
            server.closed = True
            server.hang_up()
        self.transport.close()


def _buckets(named_tensors, world) -> Iterator[list[tuple[str, torch.Tensor]]]:
    bucket, size = [], 0
    for name, tensor in named_tensors:
        tensor = tensor.to(world.device, world.dtype)
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


# ---------------------------------------------------------------------------------------- transport
class SharedMemory:
    """Weights to servers on the same machine, through files in memory (CPU). They have no name, so
    that nothing is left of them if the trainer dies."""

    def __init__(self):
        if not hasattr(os, "memfd_create"):
            raise InputError("--vllm on a CPU: needs Linux.")

    def connect(self, server):
        """Nothing to connect."""

    def send(self, engine, servers, errors, bucket) -> list[Server]:
        content = save({name: tensor.contiguous() for name, tensor in bucket})
        with open(os.memfd_create("nanopost"), "wb") as file:
            file.write(content)
            file.flush()
            # A late request must not read a later file under the same path.
            inode = os.fstat(file.fileno()).st_ino
            info = {"path": f"/proc/{os.getpid()}/fd/{file.fileno()}", "inode": inode}
            return engine._each(servers, errors, lambda s: engine._update(s, info))

    def close(self):
        """Nothing to close."""


class Nccl:
    """Weights from GPU to GPU, through vLLM's own packed broadcast: a group for each server."""

    def __init__(self):
        self.groups = {}
        self.device = torch.cuda.current_device()

    def connect(self, server):
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._leave(server)
        size = server.get("/get_world_size?include_dp=true")["world_size"] + 1
        with socket.create_connection((server.host, server.port), timeout=QUICK) as seen:
            address = seen.getsockname()[0]  # under which the server can reach this machine
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        about = {"master_address": address, "master_port": port, "world_size": size}
        joined = _Thread(lambda: trainer_init(about), self.device)
        body = {"init_info": {**about, "rank_offset": 1, "packed": True}}
        server.post("/init_weight_transfer_engine", body)
        self.groups[server.url] = joined.result(server.timeout, server)

    def send(self, engine, servers, errors, bucket) -> list[Server]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        # The bucket is gathered: the sender works on streams of its own.
        torch.cuda.current_stream().synchronize()
        info = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
        }

        def send_to(server):
            def broadcast():
                packed_nccl_broadcast_producer(
                    iter(bucket), self.groups[server.url], src=0, post_iter_func=lambda x: x[1]
                )

            engine._check_mark(server)
            sent = _Thread(broadcast, self.device)
            try:
                engine._update(server, info)
                sent.result(server.timeout, server)
            except Exception:
                self._leave(server)  # else its broadcast would keep the GPU waiting
                raise

        sound = []
        for server in servers:  # one after the other: two groups on one GPU may block each other
            sound += engine._each([server], errors, send_to)
        return sound

    def _leave(self, server):
        if group := self.groups.pop(server.url, None):
            group.destroy()

    def close(self):
        for group in self.groups.values():
            group.destroy()
        self.groups.clear()


class _Thread:
    """A call in a daemon thread: NCCL has no time-out, and must not keep the process alive."""

    def __init__(self, function, device):
        self.answer, self.error = None, None

        def run():
            try:
                torch.cuda.set_device(device)
                self.answer = function()
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self, timeout, server):
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise ServerError(f"{server.url}: NCCL did not end in {timeout:g} s")
        if self.error is not None:
            raise ServerError(f"{server.url}: NCCL: {self.error}")
        return self.answer
