"""Who may ask, how often and how much: what stands between the network and the routes.

    host, origin    a page of another site cannot use this server through its visitor's browser, neither directly nor
                    by giving its own name this machine's address (DNS rebinding)
    rate            a token bucket for each client address, so many requests a minute
    key             a bearer key, compared in constant time, and never written anywhere
    body            JSON, at most a mebibyte, within half a minute

What is unusual here: the rate comes before the key, so that keys cannot be tried out at any speed; and every answer,
a refusal too, has the headers that keep a browser from making more of it than was meant.
"""

import asyncio
import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.serving.schemas import APIError

MOST_BYTES = 2**20
"""Of a request's body."""
MAX_DRAIN_BYTES = 16 * MOST_BYTES
"""Of a body that is too large so much is heard out (and dropped), since many clients read no answer before they have
sent all; of a larger one no more."""
BODY_SECONDS = 30.0
"""For a request's body to arrive in."""
MOST_CLIENTS = 10_000
"""Client addresses that are remembered; beyond, the one that was not seen for longest is forgotten."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def error_response(refused: APIError) -> JSONResponse:
    """A refusal as an answer."""
    headers = {"retry-after": str(refused.retry_after)} if refused.retry_after else {}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refused.to_json(), refused.status, headers)


class SecurityMiddleware:
    """ASGI middleware: refuses what must not come in, and puts `HEADERS` on every answer.

    host: the address that is listened at; names: what the server is called besides. key: "" for none.
    rate: requests a minute and client, 0 for any number. Both hold for what is below /v1/.
    """

    def __init__(self, app: ASGIApp, *, host: str, names: tuple[str, ...] = (), key: str = "", rate: int = 0) -> None:
        self._app, self._hosts = app, TrustedHosts(host, names)
        self._key = _digest(key.encode()) if key else None
        self._rate = RateLimiter(rate) if rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            self._check(scope)
        except APIError as refused:
            await error_response(refused)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._hosts.check(headers.get("host", ""), headers.get("origin"))
        if not scope["path"].startswith("/v1/"):
            return
        if self._rate is not None and (wait := self._rate.take((scope.get("client") or ("",))[0])):
            message = f"too many requests from this address: wait {math.ceil(wait)} s"
            raise APIError(429, message, code="rate_limit_exceeded", retry_after=math.ceil(wait))
        if self._key is not None:
            self._check_key(headers.get("authorization", ""))

    def _check_key(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key or b"")
        if scheme.lower() == "bearer" and right:
            return
        what = "the key is wrong" if authorization else "this server wants a key"
        raise APIError(401, f"{what}: send the header Authorization: Bearer KEY", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that comparing takes one time for all."""
    return hashlib.sha256(key).digest()


class TrustedHosts:
    """What a request may call this server: names that no other site can have.

    On loopback those of loopback; elsewhere any address too, since rebinding needs a name; and what was allowed.
    """

    def __init__(self, host: str, names: tuple[str, ...] = ()) -> None:
        self._names = {name.lower() for name in (host, *names)}
        self._addresses = not is_loopback(host)

    def check(self, host: str, origin: str | None) -> None:
        """Raises Refused for a foreign Host, and for an Origin (what a browser's page came from) that is not ours."""
        name = _name(host)
        if not (is_loopback(name) or name in self._names or (self._addresses and _is_address(name))):
            message = f"this server is not called {name[:100]!r}: graft serve --allow_hosts lets it be"
            raise APIError(403, message, code="host_not_allowed")
        if origin is not None and _place(origin) != host.lower():
            raise APIError(403, "pages of other sites may not use this server", code="origin_not_allowed")


def _name(host: str) -> str:
    """A Host header without its port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine and can mean no other."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class RateLimiter:
    """A token bucket for each client: holds a minute's requests, and fills again evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = float(per_minute), clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, at what time)

    def take(self, client: str) -> float:
        """0 if the client may go on, else the seconds until it may."""
        client, now = _network(client), self._clock()
        tokens, since = self._left.pop(client, (self._most, now))
        tokens = min(self._most, tokens + (now - since) * self._most / 60)
        self._left[client] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if tokens >= 1 else (1 - tokens) * 60 / self._most

    def __len__(self) -> int:
        return len(self._left)


def _network(client: str) -> str:
    """An IPv6 client owns all of a /64."""
    if ":" not in client:
        return client
    try:
        return str(ip_network((client.partition("%")[0], 64), strict=False))
    except ValueError:
        return client


async def read_body(request: Request) -> bytes:
    """A request's body. Raises Refused for one that is no JSON by its own account, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, "send the body as JSON, with the header Content-Type: application/json")
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MOST_BYTES:
                    content += chunk
                elif size > MAX_DRAIN_BYTES:
                    break
    except TimeoutError:
        raise APIError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise APIError(499, "the client has left") from None
    if size > MOST_BYTES:
        raise APIError(413, f"the body is too large: at most {MOST_BYTES} bytes", code="request_too_large")
    return bytes(content)
