"""A headless Chromium, spoken to by its own protocol over two pipes; nothing else is installed.

with Browser() as browser:
    page = browser.open("file:///tmp/report.html")
    page.run("document.title")
    page.requests, page.problems          # URLs asked for; console errors and exceptions
    page.picture("report.png")
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 120.0  # an answer takes milliseconds; a machine may be busy
# Descriptors 3 and 4 are those that --remote-debugging-pipe reads and writes.
SHELL = 'exec "$@" 3<&{read} 4>&{write}'
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
    "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
)  # fmt: skip


class Browser:
    """One Chromium process with a profile of its own, which ends with the block."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp()
        read, self.write_to = os.pipe()
        self.read_from, write = os.pipe()
        shell = SHELL.format(read=read, write=write)
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", PATH, *FLAGS, f"--user-data-dir={self.profile}"],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self.number, self.waiting, self.events = 0, b"", []
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.write_to)
        os.close(self.read_from)
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method: str, session: str | None = None, **params):
        """The answer to one command; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") != self.number:
                self.events.append(found)
                continue
            assert "error" not in found, found["error"]
            return found["result"]

    def wait_for(self, method: str, session: str):
        while not any(
            e.get("method") == method and e.get("sessionId") == session for e in self.events
        ):
            self.events.append(self._next())

    def _next(self) -> dict:
        end = time.monotonic() + SECONDS
        while b"\0" not in self.waiting:
            ready, _, _ = select.select([self.read_from], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium said nothing for {SECONDS:g} seconds"
            block = os.read(self.read_from, 1 << 20)
            assert block, "Chromium ended"
            self.waiting += block
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, *, theme: str = "light", width: int = 1280, height: int = 900):
        """A page, loaded; `theme` is the system's."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.ask("Emulation.setEmulatedMedia", session, features=[feature])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", session, **size)
        self.ask("Page.navigate", session, url=url)
        self.wait_for("Page.loadEventFired", session)
        return Page(self, session)


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def run(self, script: str):
        """The value of an expression in the page."""
        answer = self.browser.ask(
            "Runtime.evaluate", self.session, expression=script, returnByValue=True,
            awaitPromise=True, userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        settings = {
            "key": key,
            "code": key,
            **({"windowsVirtualKeyCode": 9} if key == "Tab" else {}),
        }
        for kind in ("keyDown", "keyUp"):
            self.browser.ask("Input.dispatchKeyEvent", self.session, type=kind, **settings)

    def named(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader is told of."""
        nodes = self.browser.ask("Accessibility.getFullAXTree", self.session)["nodes"]
        seen = [node for node in nodes if not node["ignored"]]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in seen]

    def move(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.browser.ask("Input.dispatchMouseEvent", self.session, type="mouseMoved", x=x, y=y)

    def _of(self, method: str) -> list[dict]:
        mine = [e for e in self.browser.events if e.get("sessionId") == self.session]
        return [event["params"] for event in mine if event.get("method") == method]

    @property
    def requests(self) -> list[str]:
        """The URLs that the page asked for, itself included."""
        self.run("0")  # what happened before this answer has been told
        return [found["request"]["url"] for found in self._of("Network.requestWillBeSent")]

    @property
    def problems(self) -> list:
        """Exceptions, and entries of the console and the log of errors and warnings."""
        self.run("0")
        calls = [c for c in self._of("Runtime.consoleAPICalled") if c["type"] != "log"]
        return calls + self._of("Runtime.exceptionThrown") + self._of("Log.entryAdded")

    def picture(self, path: str | Path, *, whole: bool = False) -> None:
        """Save what is seen, or the whole page, as PNG."""
        found = self.browser.ask(
            "Page.captureScreenshot", self.session, format="png", captureBeyondViewport=whole
        )
        Path(path).write_bytes(base64.b64decode(found["data"]))
