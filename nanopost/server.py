"""The routes of one vLLM server, over HTTP."""

import base64
import http.client
import io
import json
import os
import socket
import threading
from urllib.parse import urlsplit

import numpy as np

from nanopost import InputError

QUICK = 10.0  # seconds in which a server must say how it is
WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError)  # an answer of another form


class ServerError(Exception):
    """A server did not do what it was asked to. The message begins with its address."""


class Refused(ServerError):
    """It says that the request is wrong: another server would say so too."""


MINE = threading.local()  # of a thread of _at_once: `ended`, set when its requests are to end


def is_over() -> bool:
    """Whether the requests of this thread are to end."""
    return hasattr(MINE, "ended") and MINE.ended.is_set()


# ------------------------------------------------------------------------------------------- server
class Server:
    """The routes of one vLLM server. Connections are kept and used again."""

    def __init__(self, url: str, timeout: float, flag: str = "--vllm"):
        """url: http://host:port, or https. timeout: seconds that a request may take. flag: that
        names it, for errors."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError:  # a port that is no number
            parts, port = urlsplit(""), None
        rest = parts.path.strip("/") or parts.query
        if parts.scheme not in ("http", "https") or not parts.hostname or rest:
            raise InputError(f"{flag} {url}: give an address such as http://127.0.0.1:8000.")
        self.url, self.timeout = url.rstrip("/"), timeout
        self.secure, self.host = parts.scheme == "https", parts.hostname
        self.port = port or (443 if self.secure else 80)
        self.lock = threading.Lock()
        self.idle: list[http.client.HTTPConnection] = []
        self.busy: dict[http.client.HTTPConnection, threading.Event | None] = {}  # to its `ended`
        self.closed = False
        self.load = 0  # prompts that it is asked for

    def get(self, path: str, timeout: float = QUICK) -> dict:
        return self._call("GET", path, None, min(timeout, self.timeout), again=True)

    def post(
        self,
        path: str,
        body: dict | None = None,
        timeout: float | None = None,
        again: bool = False,
    ) -> dict:
        """again: the request may be sent twice. Otherwise it goes over a new connection: when one
        that was kept is closed, nobody knows whether the server has read the request."""
        return self._call("POST", path, body, timeout or self.timeout, again)

    def _call(self, method, path, body, timeout, again):
        """The server's answer to one request, or ServerError."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body)
        while True:
            with self.lock:
                if self.closed or is_over():
                    raise ServerError(f"{self.url}{path}: the engine is closed")
                kept = again and bool(self.idle)
                connection = self.idle.pop() if kept else self._connection()
                self.busy[connection] = getattr(MINE, "ended", None)
            limit = timeout
            try:
                if connection.sock is None:
                    limit = connection.timeout = min(timeout, QUICK)
                    connection.connect()
                    limit = timeout
                    if connection not in self.busy:
                        raise ConnectionAbortedError("hung up")
                connection.sock.settimeout(timeout)
                connection.request(method, path, data, headers)
                answer = connection.getresponse()
                text = answer.read()
            except TimeoutError as error:
                connection.close()
                sentence = f"{self.url}{path}: no answer in {limit:g} s"
                if limit == self.timeout:
                    sentence += " (--vllm_timeout)"
                raise ServerError(sentence) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept and connection in self.busy:  # the server had closed it
                    continue
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ServerError(f"{self.url}{path}: {reason}") from error
            finally:
                with self.lock:
                    self.busy.pop(connection, None)
            with self.lock:
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
        kind = Refused if status in (400, 422) else ServerError
        raise kind(f"{self.url}{path}: status {status}: {str(answer)[:300]}")

    def hang_up(self, ended: threading.Event | None = None):
        """End the requests in flight, or those of one _at_once: each raises ServerError."""
        with self.lock:
            chosen = [c for c, theirs in self.busy.items() if ended in (None, theirs)]
            for connection in chosen:
                del self.busy[connection]
            idle, self.idle = self.idle, []
        for connection in idle:
            connection.close()
        for connection in chosen:
            sock = connection.sock
            if sock is not None:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is closed already


def as_server_error(server, error) -> Exception:
    """An error of a server; what is wrong with the form of an answer becomes one."""
    if isinstance(error, ServerError):
        return error
    return ServerError(f"{server.url}: an answer of another form: {error!r}")


def routes_of(url: str, text: str, tokens: int, config) -> np.ndarray:
    """The experts that a server names -> int16 [tokens, L, A] (Example.routes).

    text: the base64 of an .npy file, with those of every layer, whether it has any, and of all
    tokens but the last, whose are -1 here. ServerError if they are not of a model of this config,
    or one is named twice for a token, as where the server has kept none.
    """
    try:
        given = np.load(io.BytesIO(base64.b64decode(text)))
    except (ValueError, TypeError, EOFError) as error:
        raise ServerError(f"{url}: experts of another form: {error!r}") from error
    expected = tokens - 1, config.layers, config.experts.active
    if given.shape != expected or given.max(initial=0) >= config.experts.count:
        raise ServerError(
            f"{url}: experts up to {given.max(initial=0)} of {given.shape} tokens, layers and "
            f"places, instead of {config.experts.count} of {expected}"
        )
    routes = given[:, [i for i, block in enumerate(config.blocks) if block.experts]]
    routes = routes.astype(np.int16)
    twice = (np.diff(np.sort(routes, -1), axis=-1) == 0).any((1, 2))
    if twice.any():
        raise ServerError(
            f"{url}: an expert is named twice for token {int(twice.argmax())}, and for "
            f"{int(twice.sum())} tokens of {len(routes)}: it has not kept what they took"
        )
    return np.concatenate([routes, np.full_like(routes[:1], -1)])
