"""One page in headless Chromium, by its DevTools protocol: what it logs, asks of the network, and looks like."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60


def executable() -> str | None:
    """Where Chromium is, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """An open page. requests: addresses that it has asked for; complaints: errors, warnings and what it logged."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._number = 0
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask one thing and wait for its answer; events on the way are kept."""
        self._number += 1
        self.socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while (told := self._next()).get("id") != self._number:
            pass
        assert "error" not in told, told
        return told["result"]

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Show a file at a width in CSS pixels, as a phone if it is narrow, and wait until it is loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Page.navigate", url=path.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def point_at(self, selector: str, click: bool = False) -> None:
        """Move the mouse to the middle of an element; click: and click there."""
        box = self.evaluate(f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect(); "
                            "return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
        at = {"x": box[0], "y": box[1]}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        told = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def _next(self) -> dict[str, Any]:
        told = json.loads(self.socket.recv(timeout=SECONDS))
        method, params = told.get("method"), told.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        return told


@contextmanager
def open_tab() -> Iterator[Tab]:
    """A browser of its own with one empty page."""
    program = executable()
    assert program is not None
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        command = [program, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(profile)), max_size=None) as browser:
                browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
                pages = json.loads(browser.recv(timeout=SECONDS))["result"]["targetInfos"]
                page = next(target["targetId"] for target in pages if target["type"] == "page")
            host = _address(Path(profile)).split("/devtools")[0]
            with connect(f"{host}/devtools/page/{page}", max_size=None) as socket:
                yield Tab(socket)
        finally:
            process.kill()
            process.wait()


def _address(profile: Path) -> str:
    """Where the browser listens, which it writes into its profile once it does."""
    until = time.monotonic() + SECONDS
    while True:
        port = profile / "DevToolsActivePort"
        lines = port.read_text().splitlines() if port.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        assert time.monotonic() < until, f"Chromium did not start within {SECONDS} seconds"
        time.sleep(0.05)
