"""A real headless Chromium, driven over the W3C WebDriver protocol with the standard library."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = (
    "" if CHROMIUM and CHROMEDRIVER else "no chromium with chromedriver here (apt-get install chromium chromium-driver)"
)

_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,900",
]


class Browser:
    """Use with `with Browser(empty_folder) as page`."""

    def __init__(self, profile):
        self._profile = profile

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
        self._url = f"http://127.0.0.1:{port}"
        try:
            self._await(lambda: self._call("GET", "/status")["ready"])
            options = {"args": [*_ARGUMENTS, f"--user-data-dir={self._profile}"], "binary": CHROMIUM}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self._driver.kill()
            self._driver.wait()
            raise
        self._url += f"/session/{session}"
        return self

    def __exit__(self, *exc):
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()

    def _call(self, method, path, body=None):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"{method} {path}: {error.read().decode()[:500]}") from None

    @staticmethod
    def _await(condition, seconds=30):
        """Polls until the condition holds; a condition that raises OSError is not there yet."""
        end = time.monotonic() + seconds
        while True:
            try:
                if value := condition():
                    return value
            except OSError:
                pass
            if time.monotonic() > end:
                raise TimeoutError("the browser did not get there")
            time.sleep(0.05)

    def open(self, url):
        self._call("POST", "/url", {"url": url})

    def run(self, script, *args):
        """The value of a function body run in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def wait_for(self, script):
        return self._await(lambda: self.run(f"return {script}"))

    def find(self, selector):
        return next(iter(self._call("POST", "/element", {"using": "css selector", "value": selector}).values()))

    def text(self, selector):
        return self._call("GET", f"/element/{self.find(selector)}/text")

    def click(self, selector):
        self._call("POST", f"/element/{self.find(selector)}/click")

    def type(self, selector, text):
        self._call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def choose(self, selector, value):
        """As a person chooses an option: by clicking on it."""
        self.click(f"{selector} option[value='{value}']")

    def console(self):
        return self._call("POST", "/se/log", {"type": "browser"})

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))
