"""Headless Chromium for tests of pages, without a network, controlled by its DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
SECONDS = 60
PHONE, DESKTOP = 420, 1280
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
]


@dataclass
class Page:
    """An open page, with its requests and problems so far."""

    browser: "Browser"
    session: str
    width: int
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_until(self, script: str) -> None:
        """Wait for a JavaScript expression to become true."""
        deadline = time.monotonic() + SECONDS
        while not self.evaluate(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"never came true: {script}"
            time.sleep(0.05)

    def sideways(self) -> int:
        """By how many pixels the page is wider than its tab, and so scrolls sideways."""
        width: int = self.evaluate("document.scrollingElement.scrollWidth")
        return width - self.width

    def screenshot(self, path: Path) -> None:
        """The whole page, however long, as a PNG file."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, self, **params)

    def note(self, event: dict[str, Any]) -> None:
        """Record the request or the problem of an event."""
        params = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.problems.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])


class Browser:
    """A running Chromium. Messages are JSON, each followed by a zero byte."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.pages: dict[str, Page] = {}
        self._received = b""
        self._number = 0

    def open(self, path: Path, width: int = DESKTOP) -> Page:
        """Open a file in a new tab of that width, and wait until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = self.pages[attached["sessionId"]] = Page(self, attached["sessionId"], width)
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", page)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", page, mobile=width == PHONE, **metrics)
        self.call("Page.navigate", page, url=path.as_uri())
        page.wait_until("document.readyState === 'complete' && location.protocol === 'file:'")
        return page

    def call(self, method: str, page: Page | None = None, **params: Any) -> Any:
        """Send a command and return its answer; events in between are recorded by their pages."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if page is not None:
            message["sessionId"] = page.session
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("sessionId") in self.pages:
                self.pages[answer["sessionId"]].note(answer)

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        while b"\0" not in self._received:
            ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
            assert ready, f"Chromium has not answered for {SECONDS} seconds"
            received = os.read(self.process.stdout.fileno(), 1 << 20)
            assert received, "Chromium has ended"
            self._received += received
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run Chromium during the block. Skips the test if it is not installed."""
    if CHROMIUM is None:
        pytest.skip("Chromium isn't installed (apt install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        # Chromium reads commands from descriptor 3 and answers on 4.
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with process:
            try:
                yield Browser(process)
            finally:
                process.terminate()
