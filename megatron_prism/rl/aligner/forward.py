"""On a node of the actor: hand requests at a loopback port on to the reward server, with its token, which NeMo-Aligner's client cannot send.

Only the standard library: the export copies this file, and NeMo-Aligner's container runs it.
    PRISM_REWARD_TOKEN=... python forward.py PORT HOST:PORT
The port opens once the reward server is ready; NeMo-Aligner's client waits for it.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_BYTES = 256 << 20
READY_S, ANSWER_S = 1800.0, 7200.0
PASSED_ON = ("Content-Type", "Inference-Header-Content-Length")


class Forwarder(BaseHTTPRequestHandler):
    """Hands a request on, and the answer back. Each connection carries one request."""

    protocol_version = "HTTP/1.1"
    timeout = 120

    def do_GET(self) -> None:
        """Hand a GET on."""
        self.hand_on(b"")

    def do_POST(self) -> None:
        """Hand a POST on."""
        size = int(self.headers.get("Content-Length", 0))
        if not 0 <= size <= MAX_BYTES:
            self.send_error(413)
            return
        self.hand_on(self.rfile.read(size))

    def hand_on(self, body: bytes) -> None:
        """Send this request to the reward server; answer 502 where it cannot be reached."""
        self.close_connection = True
        headers = {name: self.headers[name] for name in PASSED_ON if name in self.headers}
        try:
            status, answer, given = ask(self.server.upstream, self.command, self.path, body, headers)  # type: ignore[attr-defined]
        except (OSError, http.client.HTTPException) as error:
            self.send_error(502, explain=type(error).__name__)
            return
        self.send_response_only(status)
        for name in PASSED_ON:
            if name in given:
                self.send_header(name, given[name])
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Print nothing: the reward server logs."""


def ask(upstream: str, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
    """Return the reward server's status, body and headers."""
    connection = http.client.HTTPConnection(upstream, timeout=ANSWER_S)
    try:
        token = os.environ.get("PRISM_REWARD_TOKEN")
        given = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, body, {**headers, **given, "Content-Length": str(len(body))})
        response = connection.getresponse()
        return response.status, response.read(MAX_BYTES), dict(response.getheaders())
    finally:
        connection.close()


def main(port: int, upstream: str) -> int:
    """Wait for the reward server, then hand requests on until the process is ended. Return an exit code."""
    until = time.monotonic() + READY_S
    while True:
        try:
            status, _, _ = ask(upstream, "GET", "/v2/health/ready", b"", {})
        except (OSError, http.client.HTTPException):
            status = 0
        if status == 200:
            break
        if status == 401 or time.monotonic() > until:
            print(f"forward.py: the reward server at {upstream} answers {status or 'nothing'}", file=sys.stderr)
            return 4
        time.sleep(1)
    server = ThreadingHTTPServer(("127.0.0.1", port), Forwarder)
    server.upstream = upstream  # type: ignore[attr-defined]
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
