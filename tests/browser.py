"""A headless Chromium driven through its DevTools protocol, with the standard library alone.

The protocol runs over two pipes (messages end in a NUL byte), so no port is opened. No host name resolves and every
page is kept offline; what a page asks for, and what it complains about, is recorded.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)

# Chromium expects the pipes as descriptors 3 (read) and 4 (write). A process of our own puts them there: doing so in
# the fork of subprocess could overwrite a descriptor which subprocess itself uses.
LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


# What sticks out of the window and does not scroll inside a box of its own.
OVERFLOW = """
[...document.querySelectorAll("body, body *")].filter((e) => {
  if (e.closest(".scroll") && !e.matches(".scroll")) return false;
  const box = e.getBoundingClientRect();
  return box.right > innerWidth + 1 || box.left < -1;
}).map((e) => `${e.tagName}.${e.getAttribute("class")}`)
"""


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page. Use as a context manager.

    Of the current page, `problems` holds console errors, uncaught exceptions and log errors; `requests` the URLs it
    asked for.
    """

    def __init__(self, executable: str, profile: Path, timeout: float = 60.0) -> None:
        self.executable = executable
        self.profile = profile
        self.timeout = timeout
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._events: list[str] = []
        self._number = 0
        self._pending = b""

    def __enter__(self) -> Browser:
        child_read, self._write = os.pipe()
        self._read, child_write = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(child_read), str(child_write), self.executable]
        with open(self.profile.with_suffix(".log"), "wb") as log:
            self._process = subprocess.Popen(
                [*command, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
                pass_fds=(child_read, child_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(child_read)
        os.close(child_write)
        try:
            self._open_page()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_page(self) -> None:
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def close(self) -> None:
        """Ends this browser, by its own process id, and closes the pipes."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)

    # The protocol

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; returns its result, recording the events that arrive meanwhile."""
        number = self._post(method, params)
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _post(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        return self._number

    def _receive(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            chunk = os.read(self._read, 1 << 16) if ready else b""
            if not chunk:
                ended = "ended" if ready else f"gave no answer in {self.timeout} s"
                log = self.profile.with_suffix(".log").read_text(errors="replace")
                raise RuntimeError(f"the browser {ended}, waiting for {waiting_for}:\n{log[-2000:]}")
            self._pending += chunk
        data, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(data)
        self._record(message.get("method"), message.get("params", {}))
        return message

    def _record(self, method: str | None, params: dict[str, Any]) -> None:
        if method is None:
            return
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":  # it would hold up the page for ever
            self.problems.append(f"a dialog opened: {params['message']}")
            self._post("Page.handleJavaScriptDialog", {"accept": False})
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    # What a test does with a page

    def open(self, page: Path) -> None:
        """Load a page from the disk and wait for its load event."""
        self.problems, self.requests, self._events = [], [], []
        failure = self.send("Page.navigate", url=page.resolve().as_uri()).get("errorText")
        if failure:
            raise RuntimeError(f"{page}: {failure}")
        deadline = time.monotonic() + self.timeout
        while "Page.loadEventFired" not in self._events:
            self._receive(deadline, "the load event")

    def view(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Set the size of the window, in CSS pixels, and the colour scheme the reader prefers."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON would carry it."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def point(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, x: float = 0, y: float = 0, width: float | None = None, height: float | None = None) -> bytes:
        """A PNG of a rectangle of the page, or of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": x, "y": y, "width": width or size["width"], "height": height or size["height"], "scale": 1}
        answer = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


def pixels(png: bytes) -> list[list[tuple[int, int, int]]]:
    """The rows of an 8-bit RGB or RGBA PNG without interlacing, which is what Chromium writes."""
    at, data = 8, b""
    width = height = channels = 0
    while at < len(png):
        (length,), kind = struct.unpack_from(">I", png, at), png[at + 4 : at + 8]
        body = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", body)
            channels = {2: 3, 6: 4}[colour]
            assert depth == 8
            assert body[12] == 0
        elif kind == b"IDAT":
            data += body
        at += length + 12
    raw, stride = zlib.decompress(data), width * channels
    rows, above = [], bytearray(stride)
    for row in range(height):
        start = row * (stride + 1)
        above = unfilter(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), above, channels)
        rows.append([(above[i], above[i + 1], above[i + 2]) for i in range(0, stride, channels)])
    return rows


def unfilter(kind: int, line: bytearray, above: bytearray, channels: int) -> bytearray:
    """Undo one of the five row filters of the PNG format."""
    for i in range(len(line)):
        left = line[i - channels] if i >= channels else 0
        up, corner = above[i], above[i - channels] if i >= channels else 0
        if kind == 1:
            line[i] = (line[i] + left) & 255
        elif kind == 2:
            line[i] = (line[i] + up) & 255
        elif kind == 3:
            line[i] = (line[i] + (left + up) // 2) & 255
        elif kind == 4:
            nearest = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
            line[i] = (line[i] + nearest) & 255
    return line
