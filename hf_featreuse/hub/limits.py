"""Limit what the client of huggingface_hub waits for and reads while a push runs.

The client has no limits: a server that is silent, that sends without end or that asks to wait for a day would block a
push forever. The limits are hooks of the client that `set_client_factory` makes, around the user's factory if there is
one, and do nothing while no push runs. They do not affect what a push never requests: downloads of files, such as a
data set that is streamed while a push runs in the background, may be large and come from another server.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import hf_raise_for_status, set_client_factory

from hf_featreuse.hub.http_errors import HTTPError, SyncByteStream, TransportError

# Seconds without a byte in either direction, for a whole answer, and that a busy server may ask us to wait.
SILENCE_SECONDS, ANSWER_SECONDS, WAIT_SECONDS = 60.0, 300.0, 300
# Bytes of an answer: all are JSON of a few kilobytes; compressed ones, which nobody requested, may expand.
ANSWER_BYTES, COMPRESSED_BYTES = 16 << 20, 64 << 10
_RESET, _AFTER = re.compile(r";\s*t\s*=\s*(\d+)", re.ASCII), re.compile(r"^\s*(\d+)\s*$", re.ASCII)
_API = f"{urlsplit(constants.ENDPOINT).path.rstrip('/')}/api/"
_CONFLICT = "another conflicting operation is in progress"

_lock = threading.Lock()
_running = 0


class RefusedAnswer(HTTPError):
    """An answer that is refused; asking again would give the same."""


class BusyServer(TransportError):
    """Another operation on the account runs; a later request may succeed."""


@contextlib.contextmanager
def limited_requests() -> Iterator[None]:
    """Apply the limits to the requests of the client until the exit."""
    global _running
    with _lock:
        make = hub_http._GLOBAL_CLIENT_FACTORY
        if not isinstance(make, _LimitedClients):
            set_client_factory(_LimitedClients(make))
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1


class _LimitedClients:
    """A client factory that adds hooks to the clients of another factory."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        client = self.make()
        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], _before], "response": [_after, *hooks["response"]]}
        return client


def _before(request: Any) -> None:
    """Give a request the timeouts that it lacks."""
    if _running and _is_of_pushes(request):
        given = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        limits = {kind: SILENCE_SECONDS if given.get(kind) is None else given[kind] for kind in kinds}
        request.extensions = {**request.extensions, "timeout": limits}
        request.headers["Accept-Encoding"] = "identity"


def _after(response: Any) -> None:
    """Limit the body of an answer, and refuse redirects to other servers and long waits."""
    if not _running or not _is_of_pushes(response.request):
        return
    response.stream = _LimitedStream(response.stream, "Content-Encoding" in response.headers)
    request = response.request
    if response.has_redirect_location:
        there = request.url.join(response.headers["Location"])
        if (there.scheme, there.host, there.port) != (request.url.scheme, request.url.host, request.url.port):
            raise RefusedAnswer(f"{request.url.host} redirects to another server, {there.host}")
    wait = _asked_to_wait(response.headers)
    if wait > WAIT_SECONDS and response.status_code >= 400:
        raise RefusedAnswer(f"status {response.status_code}, and the server asks to wait {wait:,} seconds")
    # The client repeats the first request in an endless loop, and reads an answer to the second before its status.
    if response.status_code == 409 and request.url.path.endswith("/repos/create"):
        response.read()
        if _CONFLICT in response.text:
            raise BusyServer(_CONFLICT)
    if response.status_code not in (200, 400) and request.url.path.endswith("/validate-yaml"):
        hf_raise_for_status(response)


def _is_of_pushes(request: Any) -> bool:
    """Return whether a push makes such a request: one that changes something, or one to the API of the Hub."""
    return request.method not in ("GET", "HEAD") or request.url.path.startswith(_API)


def _asked_to_wait(headers: Any) -> int:
    """Return the seconds that a server asks the client to wait, as the client reads them; 0 if it does not ask."""
    asked = _RESET.findall(headers.get("RateLimit", "")) + _AFTER.findall(headers.get("Retry-After", ""))
    return max((int(seconds[:12]) for seconds in asked), default=0)


class _LimitedStream(SyncByteStream):
    """The body of an answer, which raises if it is too long or takes too long."""

    def __init__(self, stream: Any, compressed: bool) -> None:
        self.stream, self.most = stream, COMPRESSED_BYTES if compressed else ANSWER_BYTES

    def __iter__(self) -> Iterator[bytes]:
        size, end = 0, time.monotonic() + ANSWER_SECONDS
        for chunk in self.stream:
            size += len(chunk)
            if size > self.most:
                raise RefusedAnswer(f"an answer of more than {self.most:,} bytes")
            if time.monotonic() > end:
                raise RefusedAnswer(f"an answer that takes more than {ANSWER_SECONDS:g} seconds")
            yield chunk

    def close(self) -> None:
        self.stream.close()
