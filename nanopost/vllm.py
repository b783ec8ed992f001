"""Rollouts on vLLM servers: the calls of engine.py, over HTTP.

Token ids go out, token ids and log-probs come back, by vLLM's /inference/v1/generate. Start a
server, here or elsewhere, with `python -m nanopost.vllm_worker --model DIR --port 8000`.

A prompt's samples come from one server, the one with the fewest requests. A server that fails is
left out, and what it had is sent again to the others; it is back after the next sync of weights
that reaches it. Every call has a time-out.

A sync: pause, start, one update per bucket of weights, finish with a version, resume. Each sampled
token knows the version it was drawn with, so a server with other weights is noticed.
"""

import http.client
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors.torch import save_file

from nanopost import InputError, StepError, dist
from nanopost.engine import Sampling
from nanopost.rollout import Rollout
from nanopost.terminal import say

BUCKET = 2**28  # bytes of weights in one update
REQUESTS = 256  # in flight from one rank
QUICK = 10.0  # seconds in which a server must say how it is
TRIES = 3  # of one prompt on each server


class ServerError(Exception):
    """A server did not do what it was asked to. The message begins with its address."""


class Refused(ServerError):
    """It says that the request is wrong: another server would say so too."""


# ------------------------------------------------------------------------------------------- server
class Server:
    """The routes of one vLLM server. Connections are kept and used again."""

    def __init__(self, url: str, timeout: float):
        """url: http://host:port, or https. timeout: seconds that a request may take."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--vllm {url}: give an address such as http://127.0.0.1:8000.")
        self.url, self.timeout = url.rstrip("/"), timeout
        self.secure, self.host = parts.scheme == "https", parts.hostname
        self.port = parts.port or (443 if self.secure else 80)
        self.idle: list[http.client.HTTPConnection] = []
        self.busy: set[http.client.HTTPConnection] = set()
        self.load = 0  # requests in flight

    def get(self, path: str, timeout: float = QUICK) -> dict:
        return self._call("GET", path, None, timeout)

    def post(self, path: str, body: dict | None = None, timeout: float | None = None) -> dict:
        return self._call("POST", path, body, timeout or self.timeout)

    def _call(self, method, path, body, timeout):
        """The server's answer to one request, or ServerError."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body)
        while True:
            used = bool(self.idle)
            connection = self.idle.pop() if used else self._connection()
            connection.timeout = timeout
            self.busy.add(connection)
            try:
                if connection.sock is None:
                    connection.timeout = min(timeout, QUICK)
                    connection.connect()
                connection.sock.settimeout(timeout)
                connection.request(method, path, data, headers)
                answer = connection.getresponse()
                text = answer.read()
            except TimeoutError as error:
                connection.close()
                raise ServerError(f"{self.url}{path}: no answer in {timeout:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if used and not isinstance(error, socket.gaierror):
                    continue  # the server closes idle connections: the next may be a new one
                reason = str(error) or type(error).__name__
                raise ServerError(f"{self.url}{path}: {reason}") from error
            finally:
                self.busy.discard(connection)
            self.idle.append(connection)
            return self._read(path, answer.status, text)

    def _connection(self):
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return kind(self.host, self.port)

    def _read(self, path, status, text):
        try:
            answer = json.loads(text or b"null")
        except ValueError as error:
            answer = text.decode(errors="replace")
            if status == 200:
                raise ServerError(f"{self.url}{path}: not JSON: {answer[:200]!r}") from error
        if status == 200:
            return answer
        if isinstance(answer, dict):
            answer = answer.get("error", answer)
            answer = answer.get("message", answer) if isinstance(answer, dict) else answer
        kind = Refused if status in (400, 404, 422) else ServerError
        raise kind(f"{self.url}{path}: status {status}: {str(answer)[:300]}")

    def hang_up(self):
        """End all requests in flight: each raises ServerError."""
        for connection in list(self.busy):
            if connection.sock is not None:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is closed already
        while self.idle:
            self.idle.pop().close()


# ------------------------------------------------------------------------------------------- engine
class Servers:
    """The engine on one or more vLLM servers. Each rank has one; rank 0 syncs the weights."""

    def __init__(
        self, urls: list[str], tokenizer, world, config, timeout: float = 600.0, audit=None
    ):
        """config: the model's. timeout: seconds that any request may take. audit: audit.Audit."""
        self.audit = audit
        self.servers = [Server(url, timeout) for url in urls]
        self.tokenizer, self.world = tokenizer, world
        self.stop_ids = sorted(tokenizer.stop_ids)
        self.transport = (Nccl if world.device.type == "cuda" else SharedMemory)()
        self.lock = threading.Lock()
        self.closing = False
        self.version = 0
        # Weights of other runs, or those that a server has started with, have other names.
        self.run = dist.gather([secrets.token_hex(4)])[0]
        for server in self.servers:
            limits = self._ready(server)
        self.positions = min(config.hf.get("max_position_embeddings", 2**31), limits)
        self.alive: list[Server] = []  # with the weights of the last sync

    def _ready(self, server) -> int:
        """InputError unless the server is one to train with -> tokens that it takes at most."""
        try:
            server.get("/weight_info")
            limits = [model["max_model_len"] for model in server.get("/v1/models")["data"]]
            server.post("/inference/v1/generate", {"token_ids": []}, QUICK)
        except Refused as error:
            if "404" not in str(error):  # it knows the route, and wants tokens
                return min(limits)
            raise InputError(
                f"{error}: this server has no routes for training. Start it with "
                "python -m nanopost.vllm_worker --model DIR --port PORT."
            ) from error
        except ServerError as error:
            raise InputError(f"--vllm: {error}: is it up, and reachable from here?") from error
        return min(limits)

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
        if (
            longest + sampling.max_tokens > self.positions
        ):  # vLLM would sample fewer, and not say so
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_tokens} new ones exceed the "
                f"{self.positions} positions of model and server: lower --max_new_tokens, drop "
                "long prompts, or start the server with a larger --max-model-len."
            )
        seeds = seeds or [0] * len(prompts)
        if not prompts:
            return []
        with ThreadPoolExecutor(min(len(prompts), REQUESTS)) as pool:
            try:
                tasks = [
                    pool.submit(self._group, prompt, n, sampling, seed)
                    for prompt, seed in zip(prompts, seeds)
                ]
                return [task.result() for task in tasks]
            except BaseException:
                self.closing = True
                pool.shutdown(wait=False, cancel_futures=True)
                for server in self.servers:
                    server.hang_up()
                raise

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
        for _ in range(TRIES * len(self.servers)):
            server = self._least_loaded()
            before = self.version
            try:
                answer = server.post("/inference/v1/generate", body)
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                if len(choices) != n:
                    raise ServerError(f"{server.url}: {len(choices)} samples instead of {n}")
                return [self._rollout(server, prompt, c, sampling, before) for c in choices]
            except Refused as error:
                raise InputError(f"{error}.") from error
            except ServerError as error:
                if self.closing:
                    raise
                self._doubt(server, error)
            finally:
                with self.lock:
                    server.load -= 1
        raise StepError(f"a prompt has failed {TRIES} times on each server of --vllm.")

    def _least_loaded(self) -> Server:
        with self.lock:
            if not self.alive:
                urls = " ".join(server.url for server in self.servers)
                raise StepError(
                    f"no server of --vllm {urls} is left: restart them and continue with --resume, "
                    "which sends them the weights."
                )
            # Ranks count only their own requests, so each begins with another server.
            order = range(len(self.alive))
            first = self.world.rank % len(self.alive)
            best = min(order, key=lambda i: (self.alive[i].load, (i - first) % len(self.alive)))
            server = self.alive[best]
            server.load += 1
            return server

    def _doubt(self, server, error):
        """After a failed request: leave the server out unless it is sound."""
        try:
            version = server.get("/weight_info")["weight_version"]
            if server.get("/is_paused")["is_paused"]:
                reason = "it is paused, by somebody else"
            elif version != self._name(self.version):
                reason = f"its weights are {version!r}, not {self._name(self.version)!r}"
            else:
                say(f"warning: {error}; it is asked again")
                return
        except ServerError as silence:
            reason = str(silence)
        with self.lock:
            if server in self.alive:
                self.alive.remove(server)
                say(f"warning: {error}; left out until the next sync: {reason}")

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
        return Rollout(prompt, ids, logp, finish, versions, kept=kept)

    # ----------------------------------------------------------------------------------------- sync
    def _name(self, version: int) -> str:
        return f"{self.run}:{version}"

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int):
        """Bring full weights, under their checkpoint names, to every server that answers.

        A collective: every rank iterates over the tensors, rank 0 sends them. Requests that run
        ahead go on under the new weights, their cache recomputed. StepError if no server is left.
        """
        if self.audit:
            named_tensors = self.audit.watch(named_tensors)
        kept = {s.url for s in self.alive}
        lost = set(dist.gather([s.url for s in self.servers if s.url not in kept]))
        self.lost = {s.url: "not reached yet" for s in self.servers if s.url in lost}
        sound = []
        if self.world.rank == 0:
            sound = self._each(self.servers, lambda s: self._begin(s, fresh=s.url in lost))
        for bucket in _buckets(named_tensors, self.world.dtype):
            if self.world.rank == 0:
                sound = self.transport.send(self, sound, bucket)
        if self.world.rank == 0:
            sound = self._each(sound, lambda s: self._end(s, version))
        urls = dist.gather([s.url for s in sound])
        self.version = version
        with self.lock:
            self.alive = [s for s in self.servers if s.url in urls]
        if not self.alive:
            reasons = dist.gather([*self.lost.values()] if self.world.rank == 0 else [])
            raise StepError(f"no server of --vllm has the weights of step {version}: {reasons[0]}.")
        if self.audit:
            self.audit.check(self.alive, version)

    def _each(self, servers, do) -> list[Server]:
        """do(server) for all at once -> those that did not fail."""
        if not servers:
            return []
        with ThreadPoolExecutor(len(servers)) as pool:
            tasks = [pool.submit(do, server) for server in servers]
        sound = []
        for server, task in zip(servers, tasks):
            error = task.exception()
            if error is None:
                sound.append(server)
            elif isinstance(error, ServerError):
                # An update that has not ended leaves it without weights: it stays paused.
                self.lost[server.url] = str(error)
                say(f"warning: not synced: {error}")
            else:
                raise error
        return sound

    def _begin(self, server, fresh):
        # What a server does for others, or for a trainer that died, ends; our own goes on.
        mode = "abort" if fresh else "keep"
        server.post(f"/pause?mode={mode}", timeout=min(server.timeout, 60.0))
        if fresh:
            try:  # an update that a dead trainer began
                server.post("/finish_weight_update", {"weight_version": "unfinished"})
            except ServerError:
                pass  # there is none
            self.transport.connect(server)
        server.post("/start_weight_update")

    def _end(self, server, version):
        server.post("/finish_weight_update", {"weight_version": self._name(version)})
        # Keys and values of the weights before: running requests compute theirs again.
        server.post("/reset_prefix_cache?reset_running_requests=true")
        server.post("/resume")

    def sleep(self):
        """Their memory is not the trainer's."""

    def close(self):
        """Leave the servers as they are, with the weights of the last sync."""
        self.closing = True
        for server in self.servers:
            server.hang_up()
        self.transport.close()


def _buckets(named_tensors, dtype) -> Iterator[list[tuple[str, torch.Tensor]]]:
    bucket, size = [], 0
    for name, tensor in named_tensors:
        tensor = tensor.to(dtype)
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


# ---------------------------------------------------------------------------------------- transport
class SharedMemory:
    """Weights to servers on the same machine, through files in memory (CPU)."""

    def __init__(self):
        folder = Path("/dev/shm")
        self.folder = folder if folder.is_dir() else Path(tempfile.gettempdir())
        self.path = self.folder / f"nanopost-{os.getpid()}.safetensors"

    def connect(self, server):
        """Nothing to connect; what trainers that died have left is removed."""
        for path in self.folder.glob("nanopost-*.safetensors"):
            if not Path(f"/proc/{path.stem.removeprefix('nanopost-')}").exists():
                path.unlink(missing_ok=True)

    def send(self, engine, servers, bucket) -> list[Server]:
        save_file({name: tensor.contiguous() for name, tensor in bucket}, self.path)
        body = {"update_info": {"path": str(self.path)}}
        try:
            return engine._each(servers, lambda s: s.post("/update_weights", body))
        finally:
            self.path.unlink()

    def close(self):
        self.path.unlink(missing_ok=True)


class Nccl:
    """Weights from GPU to GPU, through vLLM's own packed broadcast: a group for each server."""

    def __init__(self):
        self.groups = {}

    def connect(self, server):
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        if server.url in self.groups:  # of its life before
            del self.groups[server.url]
        size = server.get("/get_world_size?include_dp=true")["world_size"] + 1
        with socket.create_connection((server.host, server.port), timeout=QUICK) as seen:
            address = seen.getsockname()[0]  # under which the server can reach this machine
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        about = {"master_address": address, "master_port": port, "world_size": size}
        joined = _Thread(lambda: trainer_init(about))
        body = {"init_info": {**about, "rank_offset": 1, "packed": True}}
        server.post("/init_weight_transfer_engine", body)
        self.groups[server.url] = joined.result(server.timeout, server)

    def send(self, engine, servers, bucket) -> list[Server]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.synchronize()  # the bucket is gathered: the sender works on streams of its own
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

            sent = _Thread(broadcast)
            server.post("/update_weights", {"update_info": info})
            sent.result(server.timeout, server)

        sound = []
        for server in servers:  # one after the other: two groups on one GPU may block each other
            sound += engine._each([server], send_to)
        return sound

    def close(self):
        self.groups.clear()


class _Thread:
    """A call in a daemon thread: NCCL has no time-out, and must not keep the process alive."""

    def __init__(self, function):
        self.answer, self.error = None, None

        def run():
            try:
                self.answer = function()
            except Exception as error:
                self.error = error

        device = torch.cuda.current_device()

        def on_device():
            torch.cuda.set_device(device)
            run()

        self.thread = threading.Thread(target=on_device, daemon=True)
        self.thread.start()

    def result(self, timeout, server):
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise ServerError(f"{server.url}: NCCL did not end in {timeout:g} s")
        if self.error is not None:
            raise ServerError(f"{server.url}: NCCL: {self.error}")
        return self.answer
