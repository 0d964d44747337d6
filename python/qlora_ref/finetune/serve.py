"""An OpenAI-compatible endpoint and a small web page over an `Engine`, with nothing but the standard library.

    GET  /                       the page (text only: what a model says is never rendered as HTML)
    GET  /v1/models              what can be asked
    POST /v1/chat/completions    whole answers, or server-sent events with "stream": true

Loopback by default. A page of another site cannot use it: the Host must be ours and the body JSON. On another address
an API key is required. Bodies, messages, tokens and waiting requests are limited; a bad request gets a 4xx.
"""

import hmac
import json
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from .. import __version__
from ..cli import UserError
from .engine import SINGLE_TURN, Engine
from .formats import Message
from .generate import Sampling

MAX_BODY = 1 << 20  # bytes
MAX_DISCARDED = 16 << 20  # bytes of a refused body that are read and dropped
MAX_MESSAGES = 256
MAX_WAITING = 8  # requests, the one being answered included
READ_TIMEOUT = 30  # seconds a client may take to send its request
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PAGES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


class Refused(Exception):
    """A request that gets a 4xx or 503: status and one sentence."""

    def __init__(self, status: HTTPStatus, sentence: str):
        super().__init__(sentence)
        self.status = status


class Server(ThreadingHTTPServer):
    """`serve_forever()` as usual. `address[0]` decides which Host headers are ours."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], engine: Engine, max_tokens: int, api_key: str | None = None):
        super().__init__(address, Handler)
        self.engine, self.max_tokens, self.api_key = engine, max_tokens, api_key
        self.loopback = address[0] in LOOPBACK
        self.places = threading.BoundedSemaphore(MAX_WAITING)


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = f"qlora_ref/{__version__}", ""
    protocol_version = "HTTP/1.1"
    timeout = READ_TIMEOUT

    # --- requests --------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, method: Any) -> None:
        self._started = False  # whether a status line has been sent
        length = self.headers.get("Content-Length") or ""
        self._unread = int(length) if length.isdigit() else 0  # bytes of the body
        try:
            self._check_origin()
            method()
        except Refused as refused:
            self.close_connection = True  # the body may not have been read
            self._json({"error": {"message": str(refused), "type": "invalid_request_error"}}, refused.status)
            self._discard()
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self.close_connection = True
            if not self._started:
                error = {"message": "the server failed; its terminal says why.", "type": "server_error"}
                self._json({"error": error}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _discard(self) -> None:
        """Read what is left of a refused body, within limits: closing on unread bytes resets the connection, and the
        client would lose the answer that says why."""
        self.wfile.flush()
        left = min(self._unread, MAX_DISCARDED)
        try:
            self.connection.settimeout(2)
            while left and (data := self.rfile.read(min(left, 1 << 16))):
                left -= len(data)
        except OSError:
            pass

    def _check_origin(self) -> None:
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0].strip("[]")
        if self.server.loopback and host not in LOOPBACK:
            raise Refused(HTTPStatus.FORBIDDEN, f"this server answers on loopback, not as {host!r}.")
        if self.server.api_key and self.path.startswith("/v1/"):
            given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.server.api_key.encode()):
                raise Refused(HTTPStatus.UNAUTHORIZED, "the API key is missing or wrong (Authorization: Bearer KEY).")

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        if path in PAGES:
            name, kind = PAGES[path]
            content = (resources.files(__package__) / "web" / name).read_bytes()
            self._send(content, f"{kind}; charset=utf-8")
        elif path == "/v1/models":
            self._json({"object": "list", "data": [self._card(n) for n in self.server.engine.served]})
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing at this address; see /v1/models.")

    def _card(self, name: str) -> dict[str, Any]:
        one = self.server.engine.served[name]
        kind = one.quantization.quant_type if one.quantization else "16-bit"
        return {
            "id": name, "object": "model", "created": 0, "owned_by": "local",
            "adapter": bool(one.adapter), "weights": kind, "single_turn": one.template in SINGLE_TURN,
        }  # fmt: skip

    def _post(self) -> None:
        if self.path.partition("?")[0] != "/v1/chat/completions":
            raise Refused(HTTPStatus.NOT_FOUND, "POST goes to /v1/chat/completions.")
        request = parse_request(self._body(), self.server)
        if not self.server.places.acquire(blocking=False):
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_WAITING} requests are waiting already; try again later."
            )
        try:
            with self.server.engine.lock:
                self._complete(request)
        finally:
            self.server.places.release()

    def _body(self) -> Any:
        if (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the Content-Type must be application/json.")
        length = self.headers.get("Content-Length") or ""
        if not length.isdigit():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed.")
        if int(length) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than {MAX_BODY} bytes.")
        self._unread = 0
        try:
            return json.loads(self.rfile.read(int(length)).decode("utf-8"))
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body is not valid JSON in UTF-8.") from None

    # --- answers ---------------------------------------------------------------------------------------------------

    def _complete(self, request: dict[str, Any]) -> None:
        engine: Engine = self.server.engine
        try:
            engine.use(request["model"])
            ids = engine.prompt(request["messages"])
        except UserError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        sampling: Sampling = request["sampling"]
        room = engine.context() - len(ids)
        if request["any_length"] and 0 < room < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=room)
        if len(ids) + sampling.max_new_tokens > engine.context():
            raise Refused(
                HTTPStatus.BAD_REQUEST,
                f"prompt ({len(ids)} tokens) and max_tokens ({sampling.max_new_tokens}) exceed the model's "
                f"{engine.context()} positions.",
            )
        cancelled = threading.Event()
        pieces = engine.stream(ids, sampling, cancelled)
        name = f"chatcmpl-{uuid.uuid4().hex}"
        if request["stream"]:
            self._events(name, request["model"], pieces, cancelled, sampling)
            return
        text = "".join(pieces)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(engine.generated)}
        message = {"role": "assistant", "content": text.strip()}
        choice = {"index": 0, "message": message, "finish_reason": self._reason(sampling)}
        body = _envelope(name, "chat.completion", request["model"], choice)
        self._json(body | {"usage": usage | {"total_tokens": sum(usage.values())}})

    def _reason(self, sampling: Sampling) -> str:
        return "length" if len(self.server.engine.generated) >= sampling.max_new_tokens else "stop"

    def send_response(self, code: int, message: str | None = None) -> None:
        self._started = True
        super().send_response(code, message)

    def _events(
        self, name: str, model: str, pieces: Iterator[str], cancelled: threading.Event, sampling: Sampling
    ) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def send(delta: dict[str, str], reason: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            self.wfile.write(
                f"data: {json.dumps(_envelope(name, 'chat.completion.chunk', model, choice))}\n\n".encode()
            )
            self.wfile.flush()

        try:
            send({"role": "assistant", "content": ""})
            for text in pieces:
                send({"content": text})
            send({}, self._reason(sampling))
            self.wfile.write(b"data: [DONE]\n\n")
        finally:  # the reader may have gone: stop generating
            cancelled.set()
            pieces.close()  # type: ignore[attr-defined]

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Requests are not logged: they hold what people ask."""


def _envelope(name: str, kind: str, model: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model, "choices": [choice]}


# --- what a request may say ------------------------------------------------------------------------------------------


def parse_request(body: Any, server: Server) -> dict[str, Any]:
    """Checked fields of a chat completion request. Refused (400, or 404 for a model that is not served)."""
    if not isinstance(body, dict):
        raise Refused(HTTPStatus.BAD_REQUEST, "the body must be a JSON object.")
    known = {
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stream",
        "n",
        "user",
    }
    if unknown := sorted(set(body) - known):
        raise Refused(HTTPStatus.BAD_REQUEST, f"unknown or unsupported fields: {', '.join(map(str, unknown))[:200]}.")
    if body.get("n", 1) != 1:
        raise Refused(HTTPStatus.BAD_REQUEST, "n must be 1.")
    name = body.get("model", next(iter(server.engine.served)))
    if not isinstance(name, str) or name not in server.engine.served:
        raise Refused(HTTPStatus.NOT_FOUND, "this model is not served; /v1/models lists what is.")
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise Refused(HTTPStatus.BAD_REQUEST, "stream must be true or false.")
    limit = server.max_tokens
    default = min(256, limit)
    tokens = _number(body, "max_completion_tokens", _number(body, "max_tokens", default, 1, limit, int), 1, limit, int)
    sampling = Sampling(
        max_new_tokens=int(tokens),
        temperature=_number(body, "temperature", 0.7, 0, 2, float),
        top_p=_number(body, "top_p", 0.9, 1e-6, 1, float),
        seed=None if body.get("seed") is None else int(_number(body, "seed", 0, 0, 2**63 - 1, int)),
    )
    any_length = body.get("max_tokens") is None and body.get("max_completion_tokens") is None
    messages = _messages(body.get("messages"))
    return {"model": name, "messages": messages, "stream": stream, "sampling": sampling, "any_length": any_length}


def _number(body: dict[str, Any], key: str, default: float, low: float, high: float, kind: type) -> float:
    value = body.get(key)
    if value is None:
        return default
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not low <= value <= high:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{key} must be a {'whole ' * (kind is int)}number in {low:g}..{high:g}.")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise Refused(HTTPStatus.BAD_REQUEST, f"messages must be a list of 1 to {MAX_MESSAGES} messages.")
    turns = []
    for m in value:
        if not isinstance(m, dict) or not isinstance(m.get("content"), str) or set(m) - {"role", "content", "name"}:
            raise Refused(HTTPStatus.BAD_REQUEST, "a message is an object with a role and a text as content.")
        if m.get("role") not in ("system", "user", "assistant"):
            raise Refused(HTTPStatus.BAD_REQUEST, "a role is system, user or assistant.")
        turns.append(Message(m["role"], m["content"]))
    roles = [t.role for t in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk or talk[::2] != ["user"] * ((len(talk) + 1) // 2) or len(talk) % 2 == 0:
        raise Refused(
            HTTPStatus.BAD_REQUEST,
            "messages alternate user and assistant (after at most one system message) and end with user.",
        )
    return tuple(turns)
