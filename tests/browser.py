"""A headless Chromium, driven over a pipe by its DevTools protocol: no further package is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = f"no browser: runs where one of {', '.join(NAMES)} is installed (apt-get install chromium)"
#: As root there is no sandbox, and containers have a small /dev/shm; GPUs and networks are not needed.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
)
FLAGS += ("--no-first-run", "--no-default-browser-check", "--remote-debugging-pipe")


def find_browser():
    """The path of an installed Chromium or Chrome; None if there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab of a running browser; `complaints` are the errors it has logged since it was opened."""

    def __init__(self, to_browser, from_browser, seconds=120):
        self._write, self._read, self._end = to_browser, from_browser, time.monotonic() + seconds
        self._count, self._buffer, self._session, self._seen = 0, b"", None, []
        self.complaints = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self):
        """The next message of the browser, which ends in a zero byte."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, self._end - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("the browser does not answer" if not ready else "the browser has ended")
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        given, name = message.get("params", {}), message.get("method", "")
        if name == "Runtime.exceptionThrown":
            self.complaints.append(str(given["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(given["args"]))
        elif name == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.complaints.append(given["entry"]["text"])
        elif name == "Network.requestWillBeSent" and not given["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"loads {given['request']['url']}")
        self._seen.append(name)
        return message

    def call(self, method, **parameters):
        """A command of the protocol, and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while (answer := self._message()).get("id") != self._count:
            continue
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path):
        """Load a file, with all its pictures."""
        self.complaints.clear()
        self._seen.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._message()

    def look(self, width, dark=False, height=900, media=""):
        """Show the page in a window of this width, light or dark, on a screen or in print."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])

    def run(self, script):
        """The value of an expression in JavaScript, as plain data."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def shoot(self, path, whole=True):
        """A picture of the page, as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder):
    """A browser whose profile is in `folder`; it ends with the block."""
    read_by_it, to_browser = os.pipe()
    from_browser, written_by_it = os.pipe()
    # It reads from its file descriptor 3 and writes to 4.
    script = f'exec "$@" 3<&{read_by_it} 4>&{written_by_it}'
    line = ["bash", "-c", script, "bash", find_browser(), *FLAGS, f"--user-data-dir={folder}"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(line, pass_fds=(read_by_it, written_by_it), **quiet)
    os.close(read_by_it)
    os.close(written_by_it)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)  # it ends by itself then
        os.close(from_browser)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
