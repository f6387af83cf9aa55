"""A real browser for tests of pages: Chromium without a window, over its DevTools protocol.

It is spoken over two pipes, which needs no package: messages are JSON, each followed by a zero
byte. Debian's package `chromium` has the browser.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60  # that a test waits for the browser's answer


def find_browser() -> str | None:
    """The program of a browser that is installed, None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A page of a browser; `events` has what the browser has told of its own accord.

    Those are the messages of the console, errors of scripts and all requests.
    """

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # The browser reads its descriptor 3 and writes 4.
        shell = f'exec 3<&{commands} 4>&{answers} && exec "$0" "$@"'
        flags = [
            "--headless=new",
            "--no-sandbox",  # which root may not have
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, find_browser(), *flags],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._received = b""
        self._number = 0
        self._session = None
        self.events: list[dict] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait(SECONDS)
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()

    def call(self, method: str, **parameters):
        """Call a method of the protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict:
        while b"\0" not in self._received:
            content = os.read(self._answers, 2**20)
            assert content, "the browser has ended"
            self._received += content
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        # What scripts and style sheets start comes before the answer to this.
        self.run("new Promise(done => setTimeout(done, 300))")

    def run(self, script: str):
        """The value of an expression, of a promise what it gives."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def requests(self) -> list[str]:
        """The addresses that the page has asked for, but for data in the page itself."""
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        addresses = [one["request"]["url"] for one in sent]
        return [address for address in addresses if not address.startswith("data:")]

    def complaints(self) -> list[str]:
        """What the page has written to the console, and the errors of its scripts."""
        wanted = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(e["params"]) for e in self.events if e["method"] in wanted]

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save a screenshot, of the whole page or of what the window shows."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
