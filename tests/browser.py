"""A headless Chromium driven over its debugging pipe: no driver, no port, no further package.

Chromium reads commands from file descriptor 3 and writes answers and events to 4, each a JSON object ended by a zero byte
(the Chrome DevTools Protocol, started with --remote-debugging-pipe).
"""
from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"]


def find_chromium() -> str | None:
    "The path of a Chromium, or None."
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    "One tab of a headless Chromium; a context manager."

    def __init__(self, width: int = 1280, height: int = 900):
        self.size = (width, height)
        self.events: list[dict] = []
        self._buffer, self._count = b"", 0

    def __enter__(self) -> Browser:
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # the shell puts the two ends where Chromium looks for them
        command = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "-", find_chromium(), *FLAGS,
                   f"--user-data-dir={self.profile}", f"--window-size={self.size[0]},{self.size[1]}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"): self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _message(self, timeout: float) -> dict:
        "The next message from the browser."
        end = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]: raise TimeoutError("Chromium does not answer")
            chunk = os.read(self._read, 1 << 16)
            if not chunk: raise RuntimeError(f"Chromium ended with code {self.process.wait()}")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, timeout: float = 60, **params: Any) -> dict:
        "Send a command and return its result; events that come meanwhile are kept in `events`."
        self._count += 1
        command = {"id": self._count, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while (message := self._message(timeout)).get("id") != self._count: self.events.append(message)
        if "error" in message: raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, url: str, timeout: float = 60) -> list[dict]:
        "Go to a page, wait until it has loaded, and return the events of loading it."
        self.events = []
        self.call("Page.navigate", url=url)
        end = time.monotonic() + timeout
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events): self.events.append(self._message(end - time.monotonic()))
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # scripts of the page have run
        return self.events

    def js(self, expression: str) -> Any:
        "The value of a JavaScript expression in the page (a promise is awaited)."
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result: raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
        return result["result"].get("value")

    def screenshot(self, path: Path, height: int | None = None) -> None:
        "Save a picture of the page, from its top down to `height` pixels, or all of it."
        full = self.js("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.size[0], "height": min(full, height or full), "scale": 1}
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture["data"]))


def problems(events: list[dict], origin: str) -> list[str]:
    "What went wrong while a page loaded: errors in the console, failed requests, requests to anywhere but `origin`."
    out = []
    for event in events:
        method, p = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown": out.append("exception: " + p["exceptionDetails"]["text"])
        if method == "Runtime.consoleAPICalled" and p["type"] == "error": out.append("console: " + str([a.get("value") for a in p["args"]]))
        if method == "Log.entryAdded" and p["entry"]["level"] == "error": out.append("log: " + p["entry"]["text"] + " " + p["entry"].get("url", ""))
        if method == "Network.responseReceived" and p["response"]["status"] >= 400: out.append(f"{p['response']['status']}: {p['response']['url']}")
        if method == "Network.requestWillBeSent" and not p["request"]["url"].startswith((origin, "data:", "about:")): out.append("elsewhere: " + p["request"]["url"])
    return out
