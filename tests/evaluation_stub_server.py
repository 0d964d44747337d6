"""A local OpenAI-compatible server that misbehaves on purpose.

`plan(n)` decides what the n-th request gets: "ok", a status code, "hang", "garbage", "empty", "cut", "slow".
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubServer:
    """Use with `with`; `seen` counts the requests that were answered well, by the prompt they asked about."""

    def __init__(self, plan=lambda n: "ok", reply=lambda prompt: "Both are fine.\n3", hang=1.0):
        self.plan, self.reply, self.hang = plan, reply, hang
        self.n, self.seen, self.headers, self.bodies = 0, {}, [], []
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                stub.answer(self)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            what = self.plan(self.n)
            self.n += 1
            self.headers.append(dict(handler.headers))
            self.bodies.append(body)
        prompt = body["messages"][-1]["content"]
        if what == "hang":
            time.sleep(self.hang)
            return
        if what == "slow":
            time.sleep(0.05)
        if isinstance(what, int):
            said = json.dumps({"error": f"status {what}, you sent {handler.headers.get('Authorization')}"})
            return self._send(handler, what, said)
        if what == "garbage":
            return self._send(handler, 200, "<html>gateway</html>")
        text = "" if what == "empty" else self.reply(prompt)
        good = json.dumps(
            {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
        )
        if what == "cut":
            return self._send(handler, 200, good, cut=True)
        if what != "empty":
            with self._lock:
                self.seen[prompt] = self.seen.get(prompt, 0) + 1
        self._send(handler, 200, good)

    @staticmethod
    def _send(handler, status, text, cut=False):
        data = text.encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        if status == 429:
            handler.send_header("Retry-After", "7")
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
