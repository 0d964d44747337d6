"""Human rating on a local web page: blind, sides randomised, every answer on the disk before the next is shown.

The page gets a question and two texts, no names. Which system is on the left follows from the seed and the item,
so all annotators of one file see an item the same way round (a majority needs that); the order of the items is
shuffled for each annotator. Rows are human ratings as `tournament` reads them: a is the left side.
"""

import hashlib
import itertools
import json
import random
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from .answers import Answer, Question
from .ledger import Ledger
from .records import item_of

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
}
_LARGEST_BODY = 4096


@dataclass(frozen=True)
class Task:
    """One comparison: system `a` is shown on the left as answer 1, `b` on the right."""

    a: str
    b: str
    question: Question
    left: str
    right: str

    @property
    def key(self) -> tuple:
        return (self.a, self.b, self.question.item)


def make_tasks(
    questions: dict[int | str, Question],
    systems: dict[str, dict[int | str, Answer]],
    items: list[int | str],
    seed: int,
) -> list[Task]:
    """Every unordered pair of systems on every item once, each with its sides drawn by `seed`."""
    tasks = []
    for (x, y), item in itertools.product(itertools.combinations(sorted(systems), 2), items):
        heads = hashlib.sha256(json.dumps([seed, x, y, item]).encode()).digest()[0] % 2
        a, b = (x, y) if heads else (y, x)
        tasks.append(Task(a, b, questions[item], systems[a][item].text, systems[b][item].text))
    return tasks


def fingerprint(tasks: list[Task], seed: int) -> dict[str, Any]:
    texts = [[t.key, t.question.text, t.left, t.right] for t in tasks]
    return {"seed": seed, "tasks": len(tasks), "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def row_key(row: dict[str, Any]) -> tuple:
    return (row["a"], row["b"], item_of({**row, "_where": "row"}), row["annotator"])


class RatingSession:
    """The tasks of one annotator over an open ledger; safe to call from the server's threads."""

    def __init__(self, tasks: list[Task], ledger: Ledger, annotator: int, seed: int):
        self.tasks, self.ledger, self.annotator = list(tasks), ledger, annotator
        random.Random(f"{seed}:{annotator}").shuffle(self.tasks)
        self._lock = threading.Lock()

    def _is_done(self, task: Task) -> bool:
        return (*task.key, self.annotator) in self.ledger.keys

    def next(self) -> dict[str, Any]:
        """What the page shows: counts, and the next task without the names of the systems."""
        done = sum(map(self._is_done, self.tasks))
        found = next((i for i, task in enumerate(self.tasks) if not self._is_done(task)), None)
        shown = None
        if found is not None:
            task = self.tasks[found]
            shown = {"id": found, "question": task.question.text, "left": task.left, "right": task.right}
        return {"done": done, "total": len(self.tasks), "task": shown}

    def answer(self, task_id: Any, score: Any) -> dict[str, Any]:
        """Stores one rating, once; the same answer sent again changes nothing. ValueError for what is no answer."""
        if type(task_id) is not int or not 0 <= task_id < len(self.tasks) or score not in (1, 2, 3):
            raise ValueError("not an answer to a task of this page")
        task = self.tasks[task_id]
        with self._lock:
            if not self._is_done(task):
                row = {"a": task.a, "b": task.b, task.question.key: task.question.item}
                self.ledger.append(row | {"annotator": self.annotator, "score": int(score)})
            return self.next()


def make_server(session: RatingSession, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 only (port 0: any free one); the caller runs and closes it."""
    files = {
        "/": ("rating_page.html", "text/html; charset=utf-8"),
        "/page.js": ("rating_page.js", "text/javascript; charset=utf-8"),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._is_ours():
                self._send(403, "text/plain", b"this server answers its own page only")
            elif self.path in files:
                name, kind = files[self.path]
                self._send(200, kind, resources.files(__package__).joinpath(name).read_bytes())
            elif self.path == "/next":
                self._send(200, "application/json", json.dumps(session.next()).encode())
            else:
                self._send(404, "text/plain", b"no such page")

        def do_POST(self) -> None:
            # Another site's page can send a form here, but not this content type without asking first.
            if not self._is_ours() or self.headers.get("Content-Type") != "application/json":
                return self._send(403, "text/plain", b"this server answers its own page only")
            try:
                body = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), _LARGEST_BODY)))
                reply = session.answer(body["id"], body["score"])
            except (ValueError, KeyError, TypeError) as error:
                return self._send(400, "text/plain", f"refused: {error}".encode())
            except OSError as error:
                return self._send(500, "text/plain", f"the disk refused: {error}".encode())
            self._send(200, "application/json", json.dumps(reply).encode())

        def _is_ours(self) -> bool:
            """The Host header names this machine: a foreign name that resolves to it does not."""
            port = server.server_port
            return self.headers.get("Host") in (f"127.0.0.1:{port}", f"localhost:{port}")

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **_HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server
