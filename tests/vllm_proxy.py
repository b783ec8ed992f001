"""A proxy between a trainer and a vLLM server that injects faults on command."""

import http.client
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Proxy:
    """Forwards to `target`, but for what `fault` has planned.

    seen: the paths of all requests, in order, each with what was done about it ("" if nothing).
    """

    def __init__(self, target: str):
        self.target = urlsplit(target)
        self.lock = threading.Lock()
        self.planned = []  # [path, fault, how many requests, how many before]
        self.seen = []
        self.released = threading.Event()
        self.sockets = set()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                proxy.sockets.add(self.connection)

            def log_message(self, *_):
                pass

            def do_GET(self):
                proxy._handle(self)

            do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fault(self, path: str, what, times: int = 10**9, after: int = 0):
        """From the `after`-th on, `times` requests whose path begins with `path` meet a fault.

        what: a status, not forwarded; "hang", not forwarded, until release(); "reset", not
        forwarded; "lose": forwarded, and the answer is dropped; "truncate": half the answer;
        "garbage": no HTTP; "form": another JSON; "stale": the connection closes after the answer;
        a float: seconds before it is forwarded; a function: called before it is forwarded.
        """
        with self.lock:
            self.planned.append([path, what, times, after])

    def heal(self):
        with self.lock:
            self.planned = []
        self.released.set()
        self.released = threading.Event()

    def count(self, path: str) -> int:
        return sum(seen.startswith(path) for seen, _ in self.seen)

    def close(self):
        """As a dead server: connections end, new ones are refused."""
        self.heal()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended

    def _planned(self, path):
        with self.lock:
            for plan in self.planned:
                if path.startswith(plan[0]):
                    if plan[3]:
                        plan[3] -= 1
                    elif plan[2]:
                        plan[2] -= 1
                        self.seen.append((path, plan[1]))
                        return plan[1]
            self.seen.append((path, ""))
            return None

    def _handle(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        what = self._planned(handler.path)
        if what == "hang":
            self.released.wait(600)
        if what in ("hang", "reset"):
            handler.close_connection = True
            return
        if isinstance(what, int):
            self._send(handler, what, b'{"error": "planned"}')
            return
        if what == "garbage":
            handler.wfile.write(b"\0\1garbage\r\n\r\n")
            handler.close_connection = True
            return
        if what == "form":
            self._send(handler, 200, b"[[]]")
            return
        if isinstance(what, float):
            time.sleep(what)
        if callable(what):
            what()
        try:
            connection = http.client.HTTPConnection(self.target.hostname, self.target.port)
            headers = {"Content-Type": "application/json"}
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
        except OSError:  # the server is dead
            handler.close_connection = True
            return
        if what == "lose":
            handler.close_connection = True
        elif what == "truncate":
            self._send(handler, answer.status, content, len(content) // 2)
            handler.close_connection = True
        else:
            self._send(handler, answer.status, content)
            handler.close_connection = what == "stale"

    def _send(self, handler, status, content, cut=None):
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:cut])
        except OSError:  # the client has gone
            handler.close_connection = True
