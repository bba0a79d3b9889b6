"""A reverse proxy that injects faults of S3 and of networks in front of a real server."""

import html
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

#: Error pages of a server may repeat it, but our messages may not.
SECRET = "token-that-nobody-may-log"  # noqa: S105
LATENCY_SECONDS = 0.3
# With SO_LINGER at 0, closing a connection resets it instead of ending it in order.
_RESET = struct.pack("ii", 1, 0)
# Headers of a connection, which a proxy does not pass on.
_OWN_HEADERS = {"connection", "content-length", "date", "server", "transfer-encoding"}


class Fault(Enum):
    """A fault that may happen to a request, described by its value."""

    LATENCY = "an answer that comes late"
    INTERNAL_ERROR = "500 InternalError"
    SLOW_DOWN = "503 SlowDown"
    RESET = "a connection reset"
    STALL = "a body that stops half-way, the connection open"
    CUT = "a truncated body with the right Content-Length"
    SHORT = "a truncated body with a Content-Length to match"
    GARBLED = "a wrong body with the right length"
    NOT_FOUND = "404 for an object that was listed"
    DENIED = "403"
    EXPIRED = "400 for a listing's continuation token"
    CHANGED = "an object that changed after it was listed"


#: The status and the code that the proxy answers with.
ERRORS = {
    Fault.INTERNAL_ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.NOT_FOUND: (404, "NoSuchKey"),
    Fault.DENIED: (403, "AccessDenied"),
    Fault.EXPIRED: (400, "InvalidArgument"),
}
#: What a store says is believed at once; what is damaged is read once more, and no more often.
BELIEVED = {Fault.NOT_FOUND, Fault.DENIED}
DAMAGES = {Fault.SHORT, Fault.GARBLED, Fault.CHANGED}
_OF_OBJECTS = {Fault.NOT_FOUND, Fault.CHANGED}


@dataclass(frozen=True)
class Request:
    """A GET. `key` is the bucket and key of an object, or a listing's prefix with "?list"."""

    key: str
    number: int  # among the requests for this key, from 1
    total: int  # all requests so far, including this one
    continues: bool  # a page of a listing after the first

    @property
    def lists(self) -> bool:
        return self.key.endswith("?list")


Plan = Callable[[Request], Fault | None]


def no_faults(_: Request) -> None:
    """The plan for an undisturbed server."""


def at_random(faults: list[Fault], share: float, seed: int) -> Plan:
    """One of these faults for this share of the requests.

    The plan depends only on seed, key and number, and so not on the order of concurrent requests.
    """

    def plan(request: Request) -> Fault | None:
        name = request.key.partition("/")[2]
        chance = random.Random(f"{seed} {name} {request.number} {request.continues}")
        possible = [fault for fault in faults if _can_have(request, fault)]
        return chance.choice(possible) if possible and chance.random() < share else None

    return plan


def passing(share: float, seed: int) -> Plan:
    """Faults for so large a share of the requests that another attempt gets past all of them."""
    plan = at_random([fault for fault in Fault if fault not in BELIEVED], share, seed)

    def pass_again(request: Request) -> Fault | None:
        fault = plan(request)
        return None if fault in DAMAGES and request.number > 1 else fault

    return pass_again


def always(fault: Fault, name: str) -> Plan:
    """This fault at every request for a key with this ending."""
    return lambda request: fault if request.key.endswith(name) else None


def outage(fault: Fault, after: int, *, lists: bool) -> Plan:
    """This fault at every request after the first `after`, for listings too if `lists`."""
    return lambda request: fault if request.total > after and (lists or not request.lists) else None


def _can_have(request: Request, fault: Fault) -> bool:
    if fault is Fault.EXPIRED:
        return request.continues
    return not (request.lists and fault in _OF_OBJECTS)


@dataclass
class FaultProxy:
    """The proxy's URL, its plan, and the requests and faults so far."""

    url: str
    plan: Plan = no_faults
    requests: Counter[str] = field(default_factory=Counter)
    injected: Counter[Fault] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, path: str) -> Fault | None:
        """Count the request, and return the fault that it gets."""
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        key = unquote(parts.path).strip("/")
        if "list-type" in query:
            key = f"{key}/{query.get('prefix', [''])[0]}?list"
        continues = "continuation-token" in query
        with self.lock:
            self.requests[key] += 1
            fault = self.plan(Request(key, self.requests[key], self.requests.total(), continues))
            if fault is not None:
                self.injected[fault] += 1
        return fault

    def take_requests(self) -> Counter[str]:
        """The number of requests for each object since the last call, by the name of its file."""
        with self.lock:
            requests, self.requests = self.requests, Counter()
        objects = {key: count for key, count in requests.items() if not key.endswith("?list")}
        return Counter({key.rpartition("/")[2]: count for key, count in objects.items()})


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy on loopback for reading from the server at the URL `upstream`."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.upstream = urlsplit(upstream).netloc
        server.proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.proxy
        server.proxy.closing.set()
        server.shutdown()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Many connections at once wait here instead of being refused.
    request_queue_size = 1024
    upstream: str
    proxy: FaultProxy

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients that give up on a stalled answer are expected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Send head and body together and at once, which saves 40 ms per answer.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        fault = self.server.proxy.next_fault(self.path)
        if fault is Fault.RESET:
            self._reset()
        elif fault in ERRORS:
            self._refuse(*ERRORS[fault])
        else:
            self._forward(fault)

    def _forward(self, fault: Fault | None) -> None:
        status, headers, body = self._ask_upstream()
        sent, length = body, len(body)
        match fault:
            case Fault.LATENCY:
                self.server.proxy.closing.wait(LATENCY_SECONDS)
            case Fault.STALL | Fault.CUT:
                sent = body[: len(body) // 2]
            case Fault.SHORT:
                sent = body[: len(body) // 2]
                length = len(sent)
            case Fault.GARBLED:
                sent = body[::-1]
            case Fault.CHANGED:
                sent = body[::-1]
                headers["etag"] = f'"{random.randbytes(16).hex()}"'
        self._answer(status, headers, sent, length)
        if fault is Fault.STALL:
            self.server.proxy.closing.wait()
        self.close_connection = fault in {Fault.STALL, Fault.CUT}

    def _ask_upstream(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            # All headers, since the signature covers the Host that the client used.
            connection.request("GET", self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            headers = {
                name.lower(): value
                for name, value in answer.getheaders()
                if name.lower() not in _OWN_HEADERS
            }
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    def _refuse(self, status: int, code: str) -> None:
        # S3 repeats the key, the session token and the signed text.
        sent = html.escape(str(self.headers))
        text = f"<Error><Code>{code}</Code><Message>{SECRET} {sent}</Message></Error>"
        self._answer(status, {"Content-Type": "application/xml"}, text.encode(), len(text))

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with suppress(OSError):
            self.connection.close()

    def log_message(self, *_: object) -> None:
        pass
