"""A real browser, headless, asked over a pipe (Chrome DevTools Protocol): pages opened from disk, what they ask for, how they lie on the screen."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe")
PATIENCE = 60  # seconds for an answer, on a busy machine


class Browser:
    """`with Browser() as browser: browser.open(path, 390)`. `requests`: every URL that the page has asked for since."""

    def __init__(self):
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            pytest.skip(f"there is no browser here ({', '.join(NAMES)}): apt-get install chromium")
        self.command, self.requests, self.count, self.buffer = found, [], 0, b""

    def __enter__(self) -> Browser:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        asks, self.asking = os.pipe()
        self.answers, answering = os.pipe()
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # the browser reads from 3 and writes to 4
        words = ["bash", "-c", script, "browser", str(asks), str(answering), self.command, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(words, pass_fds=(asks, answering), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(asks)
        os.close(answering)
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.asking)
        os.close(self.answers)
        self.profile.cleanup()

    session: str | None = None

    def ask(self, method: str, **parameters) -> dict:
        """The result of one command; what happens meanwhile is noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.asking, json.dumps(message).encode() + b"\0")
        while (answer := self._hear()).get("id") != self.count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _hear(self) -> dict:
        import select

        while b"\0" not in self.buffer:
            assert select.select([self.answers], [], [], PATIENCE)[0], "the browser does not answer"
            content = os.read(self.answers, 1 << 20)
            assert content, "the browser has ended"
            self.buffer += content
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """A file, in a window so many CSS pixels wide, once all of it has been loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.requests.clear()
        self.ask("Page.navigate", url=path.absolute().as_uri())
        while self._hear().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, code: str):
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, as long as it is."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]))

    def pdf(self, path: Path) -> None:
        """As it is printed."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=False)["data"]))
