"""moto's S3 over HTTP, with faults put in between on request."""

import base64
import hashlib
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>{}</Message></Error>'


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    query: str
    headers: dict[str, str]

    def is_part(self, number: int | None = None) -> bool:
        found = re.search(r"partNumber=(\d+)", self.query)
        return self.method == "PUT" and found is not None and number in (None, int(found[1]))


Answer = Callable[..., Iterable[bytes]]
Fault = Callable[["FaultyS3", Request, dict[str, Any], Any], Iterable[bytes] | None]


@dataclass
class FaultyS3:
    """A WSGI application: every fault sees every request before moto does, and may answer in its place."""

    backend: Any
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        headers = {k[5:].replace("_", "-").lower(): v for k, v in environ.items() if k.startswith("HTTP_")}
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"], headers)
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if (answer := fault(self, request, environ, start_response)) is not None:
                    return answer
        return self.backend(environ, start_response)

    def error(self, start_response: Any, status: str, code: str) -> Iterable[bytes]:
        body = ERROR.format(code, "as the test wants it").encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def parts_sent(self) -> list[int]:
        return [int(re.search(r"partNumber=(\d+)", r.query)[1]) for r in self.requests if r.is_part()]


def fails(status: str, code: str, *, when: Callable[[Request], bool], times: int = 10**6) -> Fault:
    """Answer with an error, so often."""
    left = [times]

    def fault(server: FaultyS3, request: Request, environ: dict[str, Any], start_response: Any) -> Any:
        if not when(request) or left[0] <= 0:
            return None
        left[0] -= 1
        return server.error(start_response, status, code)

    return fault


def hangs_up(*, when: Callable[[Request], bool], times: int = 10**6) -> Fault:
    """Close the connection without an answer."""
    left = [times]

    def fault(server: FaultyS3, request: Request, environ: dict[str, Any], start_response: Any) -> Any:
        if not when(request) or left[0] <= 0:
            return None
        left[0] -= 1
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return server.error(start_response, "500 Internal Server Error", "InternalError")

    return fault


def changes_body(change: Callable[[bytes], bytes], *, when: Callable[[Request], bool], times: int = 10**6) -> Fault:
    """Let moto answer, and send something else of its body; the announced length stays."""
    left = [times]

    def fault(server: FaultyS3, request: Request, environ: dict[str, Any], start_response: Any) -> Any:
        if not when(request) or left[0] <= 0:
            return None
        left[0] -= 1
        return [change(b"".join(server.backend(environ, start_response)))]

    return fault


def checks_sums(server: FaultyS3, request: Request, environ: dict[str, Any], start_response: Any) -> Any:
    """Refuse what does not have the sha256 that came with it, as S3 does (moto takes everything)."""
    wanted = request.headers.get("x-amz-checksum-sha256")
    if wanted is None or request.method != "PUT":
        return None
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    if base64.b64encode(hashlib.sha256(body).digest()).decode() != wanted:
        return server.error(start_response, "400 Bad Request", "BadDigest")
    import io

    environ["wsgi.input"] = io.BytesIO(body)
    return None


@contextmanager
def served(ssl_context: Any = None):
    """A server on a free port: (its URL, the application whose faults can be set)."""
    application = FaultyS3(DomainDispatcherApplication(create_backend_app))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, application, threaded=True, ssl_context=ssl_context)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if ssl_context else ''}://127.0.0.1:{server.server_port}", application
    finally:
        server.shutdown()
        thread.join()
