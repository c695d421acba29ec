"""HTTPS on the loopback interface, with a certificate made for the test.

    with serving(folder, {'/w.pth': content}) as server:
        server.url('/w.pth')   # https://127.0.0.1:PORT/w.pth
        server.asked           # [('GET', '/w.pth'), ...]

Who is to trust it has ``SSL_CERT_FILE`` set to ``server.certificate``.
"""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = bytes | Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Answers a path with bytes, or by calling a function with the handler of the request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, answers: dict[str, Answer]) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.answers, self.certificate = answers, folder / 'certificate.pem'
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.ended = threading.Event()
        key = folder / 'key.pem'
        command = (
            f'openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {self.certificate} '
            '-days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost'
        )
        subprocess.run(command.split(), check=True, capture_output=True, timeout=60)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, key)

    def url(self, path: str, host: str = '127.0.0.1', user: str = '') -> str:
        return f'https://{user}{host}:{self.server_port}{path}'

    def get_request(self) -> Any:
        plain, address = super().get_request()
        return self._context.wrap_socket(plain, True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is what many of these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append((self.command, self.path))
        self.server.headers.append({k.lower(): v for k, v in self.headers.items()})
        answer = self.server.answers.get(self.path.partition('?')[0])
        if answer is None:
            self.send_error(404)
        elif callable(answer):
            answer(self)
        else:
            reply(self, answer)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""


def reply(handler: BaseHTTPRequestHandler, body: bytes, /, status: int = 200, **headers: Any):
    """Sends a whole answer; ``Content_Length=None`` leaves that header out."""
    handler.send_response(status)
    for name, value in {'Content_Length': len(body), **headers}.items():
        if value is not None:
            handler.send_header(name.replace('_', '-'), str(value))
    handler.end_headers()
    if handler.command == 'GET':
        handler.wfile.write(body)


def redirect(target: str) -> Answer:
    """Answers with a redirect."""
    return lambda handler: reply(handler, b'', 302, Location=target)


def trickle(first: bytes, server: Callable[[], Server]) -> Answer:
    """A byte every tenth of a second, after these and until the server ends."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(first)
        while not server().ended.is_set():
            handler.wfile.write(b'x')
            time.sleep(0.1)

    return answer


@contextlib.contextmanager
def serving(folder: Path, answers: dict[str, Answer]) -> Iterator[Server]:
    """A server in a thread; its key and certificate lie in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder, answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
