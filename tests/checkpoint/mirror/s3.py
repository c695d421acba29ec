"""An S3 server on the loopback interface, and a way to it that is cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

BUCKET = 'tags'


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Serves S3 with an empty bucket; yields the endpoint's address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f'http://{host}:{port}'
    finally:
        server.stop()


def environment(endpoint: str) -> dict[str, str]:
    """What clients read from the environment."""
    return {
        'AWS_ENDPOINT_URL': endpoint, 'AWS_ACCESS_KEY_ID': 'x', 'AWS_SECRET_ACCESS_KEY': 'x',
        'AWS_DEFAULT_REGION': 'us-east-1',
    }  # fmt: skip


class Cut:
    """Passes connections on, and ends those of a number of times after so many bytes.

    Attributes:
        endpoint: to give to a client.
        cuts: how many connections were ended.
    """

    def __init__(self, endpoint: str, after: int, times: float) -> None:
        """Args:
        endpoint: of the server behind.
        after: bytes that a client may send on a connection.
        times: how many connections are ended; infinity for all.
        """
        host, _, port = endpoint.removeprefix('http://').partition(':')
        self._server, self._after, self._times = (host, int(port)), after, times
        self.cuts = 0
        self._socket = socket.create_server(('127.0.0.1', 0))
        self.endpoint = f'http://127.0.0.1:{self._socket.getsockname()[1]}'
        self._open: set[socket.socket] = {self._socket}
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Ends all connections."""
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(self._server, 10)
                self._open |= {client, server}
                for pair, limit in (((client, server), self._after), ((server, client), None)):
                    threading.Thread(target=self._pass, args=(*pair, limit), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        count = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                count += len(data)
                if limit is not None and count > limit and self.cuts < self._times:
                    self.cuts += 1
                    break
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
