"""An OpenAI-compatible chat endpoint, over the standard library, that fails clearly and keeps its key to itself.

What may pass with time (429, 5xx, time-outs, broken connections, a body that is no chat completion) is tried
again with growing pauses; what will not (401, 403, 404) stops the whole run; anything else fails one call.
Redirects are not followed: they could carry the key to another host.
"""

import http.client
import json
import math
import os
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_PASSING = {408, 409, 425, 429}
_HOPELESS = {401, 403, 404}
_LONGEST_PAUSE = 120.0
_LARGEST_REPLY = 32 << 20


class CallFailed(RuntimeError):
    """One call failed for good; the message holds no secret."""


class EndpointRefuses(RuntimeError):
    """No call can succeed: wrong key, address or model."""


class _TryAgain(Exception):
    def __init__(self, why: str, pause: float | None = None):
        super().__init__(why)
        self.pause = pause


@dataclass(frozen=True)
class Reply:
    """What the model wrote. Token counts as the server reports them (0 when it does not)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1


class Endpoint:
    """`chat` sends messages to `base_url`/chat/completions and returns a Reply. Safe to use from several threads.

    base_url: for example http://localhost:8000/v1 (scheme, host and path; no user name in it).
    key_env: name of the environment variable that holds the key, or None. It is read once, sent as a bearer token,
    and taken out of every message that leaves this class. timeout: seconds for one attempt as a whole.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base URL {base_url!r}: expected http(s)://host[:port]/path, such as http://localhost:8000/v1."
            )
        if parts.username or parts.password or parts.query:
            raise ValueError("the base URL must hold no user name, password or query; give the key by --key-env.")
        self._key = _key_from(key_env)
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if self._key and parts.scheme == "http" and not local:
            raise ValueError(
                f"the key would travel to {parts.hostname} unencrypted; use https, or leave out --key-env."
            )
        self._parts, self._path = parts, parts.path.rstrip("/") + "/chat/completions"
        self.model, self.timeout, self.retries, self.pause, self._sleep = model, timeout, retries, pause, sleep

    def __repr__(self) -> str:
        return f"Endpoint({self._parts.geturl()!r}, model={self.model!r}, key={'set' if self._key else 'none'})"

    def chat(self, messages: list[dict[str, str]], **sampling: Any) -> Reply:
        """One completion; `sampling` goes into the request (temperature, max_tokens, top_p, ...).

        Raises CallFailed after `retries` repeated failures, EndpointRefuses where repeating is hopeless.
        """
        body = json.dumps({"model": self.model, "messages": messages, **sampling}).encode()
        why = ""
        for attempt in range(1, self.retries + 2):
            try:
                text, usage = self._one_attempt(body)
                return Reply(text, *_token_counts(usage), attempts=attempt)
            except _TryAgain as again:
                why = str(again)
                if attempt <= self.retries:
                    # Doubling, with jitter so that parallel callers do not return together.
                    growing = self.pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                    self._sleep(min(max(growing, again.pause or 0.0), _LONGEST_PAUSE))
        raise CallFailed(f"gave up after {self.retries + 1} attempts; the last: {why}")

    def _one_attempt(self, body: bytes) -> tuple[str, Any]:
        try:
            status, headers, raw = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(self._clean(f"{type(error).__name__}: {error}")) from None
        if status == 200:
            return _text_of(raw)
        said = self._clean(f"HTTP {status}: {raw[:300].decode('utf-8', 'replace')}")
        if status in _PASSING or status >= 500:
            raise _TryAgain(said, _retry_after(headers))
        if status in _HOPELESS:
            raise EndpointRefuses(f"{self._parts.geturl()} answered {said}")
        raise CallFailed(said)

    def _post(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and whole body; a new connection each time, so a broken one cannot spoil the next."""
        deadline = time.monotonic() + self.timeout
        port, host = self._parts.port, str(self._parts.hostname)
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            link: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self.timeout, context=context
            )
        else:
            link = http.client.HTTPConnection(host, port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            link.request("POST", self._path, body, headers)
            response = link.getresponse()
            raw = b""
            while chunk := response.read1(1 << 16):
                raw += chunk
                if time.monotonic() > deadline:  # a server that drips never trips the socket's own time-out
                    raise TimeoutError(f"no complete reply within {self.timeout:g} s")
                if len(raw) > _LARGEST_REPLY:
                    raise OSError("the reply is larger than 32 MiB")
            if response.length:
                raise http.client.IncompleteRead(raw, response.length)
            return response.status, response.headers, raw
        finally:
            link.close()

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        return text.replace(self._key, "[key]") if self._key else text


def _key_from(key_env: str | None) -> str | None:
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise ValueError(f"the environment variable {key_env} (the endpoint's key) is not set.")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the key in {key_env} holds characters that no HTTP header may carry.")
    return key


def _text_of(raw: bytes) -> tuple[str, Any]:
    try:
        reply = json.loads(raw)
        text = reply["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _TryAgain("the body is not a chat completion") from None
    if not isinstance(text, str) or not text.strip():
        raise _TryAgain("the completion is empty")
    return text, reply.get("usage")


def _token_counts(usage: Any) -> tuple[int, int]:
    usage = usage if isinstance(usage, dict) else {}
    counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    first, second = (n if isinstance(n, int) and n >= 0 else 0 for n in counts)
    return first, second


def _retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Seconds the server asks for; its other form, a date, is left to the growing pause."""
    try:
        seconds = float(headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
