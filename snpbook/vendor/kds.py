"""The key distribution service on a socket: HTTP by tornado, in this process or in a thread of its own.

A connection has ten seconds for a request and for taking its answer, a header a mebibyte, and there are only so many
connections; what is said is `snpbook.vendor.key_service`'s. Sources: KDS (interface), RFC 9110 and 9112 (HTTP).
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from threading import Thread
from typing import Any, NoReturn, Self

from tornado.gen import with_timeout
from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream, StreamClosedError
from tornado.util import TimeoutError as Late

from snpbook.spec.kds import TARGET_MAX, KdsStatus
from snpbook.vendor.key_service import Answer, KeyService

HEADER_LIMIT = 1 << 20
LINE_LIMIT = 2 * TARGET_MAX
BODY_LIMIT = 1 << 16
"""Nobody needs to send one; it is read and dropped."""
TIMEOUT = 10.0
"""Seconds that a connection may idle, take to send a header, or leave its answer unread."""
CONNECTIONS = 500
METHODS = ("GET", "HEAD")

_HEADER = rb"\n\r?\n|\A[^\n]{%d}|\A[\s\S]{%d}" % (LINE_LIMIT, HEADER_LIMIT)
"""The end of a header, or so many bytes without one, or without the end even of the request line."""


class _Connection(IOStream):
    """A client's connection: one that comes too late or says too much hears so, where tornado would just hang up."""

    def __init__(self, accepted: socket.socket, client: str) -> None:
        super().__init__(accepted, max_buffer_size=2 * HEADER_LIMIT)
        self.client = client

    async def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> bytes:
        """A request's header, whatever `regex` tornado would stop at."""
        reading = super().read_until_regex(_HEADER)
        try:
            header: bytes = await with_timeout(timedelta(seconds=TIMEOUT), reading, quiet_exceptions=StreamClosedError)
        except Late:
            self.refuse(KdsStatus.REQUEST_TIMEOUT)
            raise StreamClosedError from None
        if len(header) >= HEADER_LIMIT or not header.endswith((b"\n\n", b"\n\r\n")):
            del header
            await self._refuse_and_drain(KdsStatus.URI_TOO_LONG)
        return header

    def write(self, data: bytes | memoryview) -> asyncio.Future[None]:
        """Send; a client that does not take it in time is cut off."""
        writing = super().write(data)
        if not writing.done():
            deadline = self.io_loop.call_later(TIMEOUT, self.close)
            writing.add_done_callback(lambda _: self.io_loop.remove_timeout(deadline))
        return writing

    def refuse(self, status: KdsStatus) -> None:
        """Say a last word, to no request in particular, and hang up."""
        with suppress(StreamClosedError):
            self.write(_last_word(status))
        self.close()

    async def _refuse_and_drain(self, status: KdsStatus) -> NoReturn:
        """Say a last word, but let the client finish: it could lose the word if it still sends (RFC 9112, 9.6)."""
        deadline = self.io_loop.call_later(TIMEOUT, self.close)
        try:
            await self.write(_last_word(status))
            while True:
                await self.read_bytes(self.read_chunk_size, partial=True)
        finally:
            self.io_loop.remove_timeout(deadline)


def _last_word(status: KdsStatus) -> bytes:
    return f"HTTP/1.1 {status} {status.phrase}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


class _Server(HTTPServer):
    """tornado's server with these connections, and no more of them than `CONNECTIONS`."""

    connected = 0

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        connection = _Connection(stream.socket, address[0])
        if self.connected >= CONNECTIONS:
            connection.refuse(KdsStatus.SERVICE_UNAVAILABLE)
            return
        self.connected += 1
        super().handle_stream(connection, address)

    def on_close(self, server_conn: object) -> None:
        self.connected -= 1
        super().on_close(server_conn)


class _Requests(HTTPServerConnectionDelegate):
    def __init__(self, service: KeyService) -> None:
        self.service = service

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        return _Request(self.service, request_conn)


class _Request(HTTPMessageDelegate):
    """One request, whose body nobody looks at."""

    def __init__(self, service: KeyService, connection: HTTPConnection) -> None:
        assert isinstance(connection, HTTP1Connection)
        assert isinstance(connection.stream, _Connection)
        self.service, self.connection, self.client = service, connection, connection.stream.client

    def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        assert isinstance(start_line, RequestStartLine)
        self.start, self.headers = start_line, headers

    def finish(self) -> None:
        answer = self._answer()
        headers = HTTPHeaders({"Content-Type": answer.media_type, "Cache-Control": "no-cache"})
        headers["Content-Length"] = str(len(answer.body))
        if answer.status is KdsStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(METHODS)
        start = ResponseStartLine("", answer.status, answer.status.phrase)
        self.connection.write_headers(start, headers, b"" if self.start.method == "HEAD" else answer.body)
        self.connection.finish()

    def _answer(self) -> Answer:
        if self.start.method not in METHODS:
            return Answer(KdsStatus.METHOD_NOT_ALLOWED, b"Method Not Allowed: nothing can be sent here\n")
        return self.service.answer(self.start.path, self.client, self.headers.get("Authorization", ""))


async def serve(service: KeyService, listening: socket.socket, stopped: Future[None]) -> None:
    """Answer on a socket of `listen` until `stopped`."""
    server = _Server(_Requests(service), max_header_size=HEADER_LIMIT, max_body_size=BODY_LIMIT, body_timeout=TIMEOUT)
    server.add_socket(listening)
    try:
        await asyncio.wrap_future(stopped)
    finally:
        server.stop()
        await server.close_all_connections()


class RunningService:
    """A service that answers in a thread of its own until it is stopped, or the process ends."""

    def __init__(self, service: KeyService, listening: socket.socket) -> None:
        self.url, self._stopped = url_of(listening), Future[None]()
        main = serve(service, listening, self._stopped)
        self._thread = Thread(target=asyncio.run, args=(main,), name="kds", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<KDS at {self.url}{'' if self._thread.is_alive() else ', stopped'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close every connection and end the thread."""
        if not self._stopped.done():
            self._stopped.set_result(None)
        self._thread.join()


def listen(port: int = 0, address: str = "127.0.0.1") -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one. `OSError` where that is not possible."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, port), family=family)
    listening.setblocking(False)
    return listening


def url_of(listening: socket.socket) -> str:
    """The base URL of a listening socket: what takes the place of `KDS_URL`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def start(service: KeyService, port: int = 0, address: str = "127.0.0.1") -> RunningService:
    """Serve from a daemon thread with an event loop of its own, so that a notebook's synchronous cells can ask."""
    return RunningService(service, listen(port, address))
