"""A headless Chromium, driven over a pipe by the DevTools protocol: no port, no package."""

import base64
import contextlib
import itertools
import json
import os
import select
import subprocess
import time

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --remote-debugging-pipe"
)


@contextlib.contextmanager
def browser(profile):
    """profile: an empty folder."""
    read_end, to_browser = os.pipe()
    from_browser, write_end = os.pipe()
    command = f'exec {CHROMIUM} {FLAGS} --user-data-dir="$1" 3<&{read_end} 4>&{write_end}'
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", str(profile)],
        pass_fds=(read_end, write_end),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_end)
    os.close(write_end)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        process.terminate()
        process.wait()
        os.close(to_browser)
        os.close(from_browser)


class Browser:
    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.numbers, self.rest = itertools.count(1), b""
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session = None

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next(time.monotonic() + 60)
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def _next(self, deadline):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.from_browser], [], [], deadline - time.monotonic())
            assert ready, "the browser does not answer"
            read = os.read(self.from_browser, 2**20)
            assert read, "the browser has ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def run(self, expression):
        """The value of JavaScript; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path, width=1440, height=900, dark=False):
        """Open a file -> seconds until it says that it is ready."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        began = time.monotonic()
        self.call("Page.navigate", url=f"file://{path}")
        ready = "performance.getEntriesByName('ready').length"
        while not self.run(ready):
            assert time.monotonic() - began < 60, self.problems()
            time.sleep(0.02)
        return time.monotonic() - began

    def key(self, key, **params):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **params)

    def mouse(self, kind, x, y, **params):
        """kind: mouseMoved, mousePressed or mouseReleased."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **params)

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def problems(self) -> list[str]:
        """Errors and warnings of the console, and requests of the page."""
        self.run("0")
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:600])
            if method == "Runtime.consoleAPICalled":
                found.append(json.dumps(params["args"])[:600])
            if method == "Log.entryAdded":
                found.append(json.dumps(params["entry"])[:600])
            if method == "Network.requestWillBeSent" and params.get("type") != "Document":
                found.append(params["request"]["url"][:600])
            if method == "Page.javascriptDialogOpening":
                found.append("a dialog: " + params["message"])
        return found

    def screenshot(self, path, whole=False):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
