"""A browser for the tests: headless Chromium, driven over a pipe by the DevTools protocol.

The messages are JSON with a zero byte after each; Chromium reads them from its file descriptor 3
and writes to 4 (--remote-debugging-pipe). https://chromedevtools.github.io/devtools-protocol

    python tests/browser.py runs/drn_s_x4_p30/report.html assets/report.png

draws the picture of a page that README.md shows: its top.
"""
import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 120                        # for an answer; a busy machine is slow to start a browser


def find() -> str | None:
    """The path of a browser of this kind; None where none is installed."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    return found[0] if found else None


class Browser:
    """One page; a context manager, which ends the browser.

    events: all that the browser has reported, such as exceptions and requests.
    """
    def __init__(self, folder):
        """folder: an empty one for the browser's own files."""
        to_browser, self.output = os.pipe()
        self.input, from_browser = os.pipe()
        # the shell moves the pipes to descriptors 3 and 4
        command = (f'exec "$0" --remote-debugging-pipe --headless --no-sandbox --disable-gpu '
                   f'--disable-dev-shm-usage --user-data-dir="$1" '
                   f'3<&{to_browser} 4>&{from_browser}')
        self.process = subprocess.Popen(
            ["bash", "-c", command, find(), str(folder)], pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.rest = b""
        self.last = 0
        self.session = None
        self.events = []

    def __enter__(self):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.input)
        os.close(self.output)

    def receive(self) -> dict:
        """The next message; TimeoutError after two minutes without one."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.input], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer of the browser in {SECONDS} seconds")
            chunk = os.read(self.input, 1 << 20)
            if not chunk:
                raise ConnectionError("the browser has ended")
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **parameters) -> dict:
        """Calls a method and returns its result; events that come before it are kept."""
        self.last += 1
        message = dict(id=self.last, method=method, params=parameters)
        if self.session:
            message["sessionId"] = self.session
        blob = json.dumps(message).encode() + b"\0"
        while blob:
            blob = blob[os.write(self.output, blob):]
        while True:
            answer = self.receive()
            if answer.get("id") == self.last:
                assert "error" not in answer, answer
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def open(self, file, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a file and waits until it is loaded; width, height in CSS pixels."""
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.events.clear()
        self.send("Page.navigate", url=file.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def value(self, expression: str):
        """What a JavaScript expression gives in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Presses and releases a key, by its name, such as ArrowRight."""
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """A mouse event: mouseMoved, mousePressed or mouseReleased, at CSS pixels of the window."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def errors(self) -> list[dict]:
        """What went wrong in the page: exceptions, errors on the console, in the network."""
        return [event for event in self.events if is_error(event)]

    def requests(self) -> list[str]:
        """What the page asked for, apart from what it has in itself."""
        urls = [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG file of what the window shows, or of the whole page."""
        options = {}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            options = dict(captureBeyondViewport=True, clip=dict(size, scale=1))
        return base64.b64decode(self.send("Page.captureScreenshot", **options)["data"])


def is_error(event: dict) -> bool:
    """Whether an event tells of a failure."""
    found = event["params"]
    return (event["method"] == "Runtime.exceptionThrown"
            or event["method"] == "Network.loadingFailed"
            or event["method"] == "Runtime.consoleAPICalled" and found["type"] == "error"
            or event["method"] == "Log.entryAdded" and found["entry"]["level"] == "error")


def draw(page: Path, output: Path) -> None:
    """Writes the picture of a page for README.md, in 256 colours: it is not to take megabytes."""
    with tempfile.TemporaryDirectory() as folder, Browser(folder) as window:
        window.open(page, 1280, 1410)
        shown = Image.open(io.BytesIO(window.screenshot())).convert("RGB")
    shown = shown.crop((0, 0, 1265, 1410))                       # without the scroll bar
    shown = shown.resize((960, 1070), Image.Resampling.LANCZOS)
    shown.quantize(256).save(output, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
