"""The reward server: KServe v2 on the standard library's http.server, as NeMo-Aligner's client asks it.

On the loopback address it serves whoever can reach it there. On any other address every request needs `Authorization: Bearer TOKEN`.
Each response closes its connection: a client then never sends a request on a connection that this side has given up.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_prism.core import log
from megatron_prism.core.errors import EnvironmentFault, InputError, Problem, printable
from megatron_prism.rl.aligner import wire
from megatron_prism.rl.aligner.reward import GraderFault, Rewarder, UnknownPrompt

HEADER_LENGTH = "Inference-Header-Content-Length"
MIN_TOKEN = 16  # characters
MAX_BATCH = 9_999_999  # what NeMo-Aligner's own reward server declares
MODEL = f"/v2/models/{wire.MODEL}"


@dataclass(frozen=True)
class Limits:
    """What one client may take. The defaults let 1,024 responses of 16k tokens through (134 MB)."""

    body_bytes: int = 256 << 20
    json_bytes: int = 16 << 20  # of a body without binary tensors, which needs far more memory once it is parsed
    num_connections: int = 64
    num_requests: int = 4  # with a body, at the same time: what memory is bounded by
    read_s: float = 120.0  # until a request is whole


@dataclass(frozen=True)
class Refused(Exception):
    """A request that is answered by a status and the reason."""

    status: int
    why: str


@dataclass
class _State:
    """What the handlers of one server share."""

    rewarder: Rewarder
    token: str | None
    limits: Limits
    requests: threading.BoundedSemaphore = field(init=False)

    def __post_init__(self) -> None:
        self.requests = threading.BoundedSemaphore(self.limits.num_requests)


class RewardServer(ThreadingHTTPServer):
    """An HTTP server of bounded threads. Bound when it is made; `serve_forever` serves, `shutdown` stops it from another thread.

    Raises: InputError where the address is not a loopback one and there is no token. EnvironmentFault where the port cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, rewarder: Rewarder, token: str | None = None, limits: Limits | None = None):
        limits = limits or Limits()
        if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
            raise InputError(
                Problem("token", f"{len(token)} characters", f"at least {MIN_TOKEN} printable ASCII characters without spaces")
            )
        if token is None and not is_loopback(host):
            raise InputError(Problem("--host", host, "a loopback address, or a token", "set PRISM_REWARD_TOKEN, on the forwarder too"))
        self.state = _State(rewarder, token, limits)
        self._connections = threading.BoundedSemaphore(limits.num_connections)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise EnvironmentFault(f"cannot serve on {host} port {port}: {error.strerror or error}; choose another --port") from error

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name, which may wait for a name server."""
        self.allow_reuse_address = True
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or answer 503 where as many as allowed are open."""
        if self._connections.acquire(timeout=1.0):
            try:
                super().process_request(request, client_address)
            except BaseException:
                self._connections.release()
                raise
            return
        with contextlib.suppress(OSError):
            request.settimeout(1.0)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection: a client that is gone is no defect."""
        log.get().warning("a request of %s ended", client_address[0], exc_info=True)


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches an address. A name other than localhost could be resolved to any address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RewardServer
    server_version, sys_version = "megatron_prism", ""

    def setup(self) -> None:
        self.request.settimeout(self.server.state.limits.read_s)  # of one read: `_late` bounds all of the headers', which need no token
        super().setup()
        self._is_late = False
        self._late = threading.Timer(self.server.state.limits.read_s, self._end_reading)
        self._late.daemon = True
        self._late.start()

    def finish(self) -> None:
        self._late.cancel()
        super().finish()

    def _end_reading(self) -> None:
        """End the headers where they stand: the thread that reads them then answers 408."""
        self._is_late = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        self._handle(self._get)

    def do_POST(self) -> None:
        self._handle(self._infer)

    def _handle(self, route: Any) -> None:
        self._late.cancel()
        start = time.monotonic()
        try:
            if self._is_late:
                raise TimeoutError
            self._check_token()
            status, body, header_bytes = route()
        except Refused as refused:
            status, body, header_bytes = refused.status, json.dumps({"error": refused.why}).encode(), None
            log.get().warning("%s %s: %d, %s", self.command, printable(self.path[:200]), status, printable(refused.why))
        except TimeoutError:
            status, body, header_bytes = 408, b'{"error": "the request did not become whole in time"}', None
        self.close_connection = True
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json" if header_bytes is None else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if header_bytes is not None:
            self.send_header(HEADER_LENGTH, str(header_bytes))
        self.end_headers()
        self.wfile.write(body)
        log.get().debug("%s %s: %d, %.3f s", self.command, printable(self.path[:200]), status, time.monotonic() - start)

    def _check_token(self) -> None:
        token = self.server.state.token
        given = self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode("latin-1", "replace"), f"Bearer {token}".encode()):
            raise Refused(401, "no Authorization header with this server's token")

    def _get(self) -> tuple[int, bytes, None]:
        answers: dict[str, Any] = {
            "/v2/health/live": None,
            "/v2/health/ready": None,
            f"{MODEL}/ready": None,
            MODEL: wire.metadata(),
            f"{MODEL}/config": wire.config(MAX_BATCH),
        }
        if self.path not in answers:
            raise Refused(404, f"no {self.path[:200]}; there are {', '.join(answers)} and POST {MODEL}/infer")
        answer = answers[self.path]
        return 200, b"" if answer is None else json.dumps(answer).encode(), None

    def _infer(self) -> tuple[int, bytes, int | None]:
        if self.path != f"{MODEL}/infer":
            raise Refused(404, f"no {self.path[:200]}; there is POST {MODEL}/infer")
        state = self.server.state
        size, header_bytes = self._sizes(state.limits)
        with state.requests:
            body = self._body(size, state.limits.read_s)
            try:
                request = wire.parse(body, header_bytes)
                del body
                return 200, *wire.respond(request, state.rewarder.rewards(request.tokens_BS, request.lengths_B))
            except wire.Malformed as error:
                raise Refused(400, str(error)) from None
            except UnknownPrompt as error:
                raise Refused(422, str(error)) from None
            except GraderFault as error:
                raise Refused(503, str(error)) from None

    def _sizes(self, limits: Limits) -> tuple[int, int | None]:
        """Return the bytes of the body, and of its JSON where binary tensors follow."""
        if self.headers.get("Transfer-Encoding") is not None or self.headers.get("Content-Encoding") not in (None, "identity"):
            raise Refused(400, "a body with Transfer-Encoding or Content-Encoding: send it plain, with Content-Length")
        texts = self.headers.get("Content-Length"), self.headers.get(HEADER_LENGTH)
        if texts[0] is None:
            raise Refused(411, "no Content-Length")
        if not all(text is None or (text.isascii() and text.isdecimal() and len(text) < 12) for text in texts):
            raise Refused(400, f"Content-Length or {HEADER_LENGTH} is no number")
        size, header_bytes = int(texts[0]), None if texts[1] is None else int(texts[1])
        most = limits.json_bytes if header_bytes is None else limits.body_bytes
        if size > most:
            raise Refused(413, f"a body of {size} bytes, at most {most}")
        return size, header_bytes

    def _body(self, size: int, read_s: float) -> bytes:
        """Read the body. Raises: TimeoutError where it is not whole in time; Refused where the client closes before."""
        body, until = bytearray(), time.monotonic() + read_s
        while len(body) < size:
            if (left_s := until - time.monotonic()) <= 0:
                raise TimeoutError
            self.connection.settimeout(left_s)
            part = self.rfile.read1(min(size - len(body), 1 << 20))
            if not part:
                raise Refused(400, f"the connection ended after {len(body)} of {size} bytes")
            body += part
        self.connection.settimeout(read_s)
        return bytes(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log what http.server would print on standard error, without control characters."""
        log.get().debug("%s", printable(format % args))
