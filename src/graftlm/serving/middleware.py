"""Security in front of the routes: hosts, origins, rate limit, API key, and the size of a body.

    host, origin    a page of another site cannot use this server through its visitor's browser: neither by a request
                    across origins nor by resolving its own name to this machine (DNS rebinding)
    rate limit      N requests a minute from each client address (the `limits` package)
    key             a bearer key, compared in constant time and never logged
    body            JSON of at most 1 MiB, received within 30 seconds

The rate limit is checked before the key, so keys cannot be tried at any speed. Every response, an error too, has
`HEADERS`, which restrict what a browser does with it. Starlette's middlewares for hosts and body sizes are not used:
they answer in plain text where OpenAI's clients read JSON, cannot admit "any IP address", and close a connection on
which the client is still sending.
"""

import asyncio
import hashlib
import math
import secrets
import time
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from fastapi import Request
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.serving.schemas import APIError

PROTECTED = ("/v1/", "/metrics", "/tokenize", "/detokenize")
MAX_BODY_BYTES = 2**20
MAX_DRAIN_BYTES = 16 * MAX_BODY_BYTES
"""Of a body that is too large this much is read and dropped: many clients read no response before they sent it all."""
BODY_TIMEOUT = 30.0

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


def error_response(error: APIError) -> JSONResponse:
    """The HTTP response of an error."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.to_json(), error.status, headers)


class SecurityMiddleware:
    """ASGI middleware: rejects requests by host, origin, rate limit and key, and adds `HEADERS` to every response.

    Args:
        app: the application.
        host: the address that the server listens at.
        allowed_hosts: further names of the server.
        api_key: "" for none. Key and rate limit apply to `PROTECTED` paths.
        rate_limit: requests a minute from one client address; 0 for no limit.
    """

    def __init__(
        self, app: ASGIApp, *, host: str, allowed_hosts: tuple[str, ...] = (), api_key: str = "", rate_limit: int = 0
    ) -> None:
        self._app, self._hosts = app, TrustedHosts(host, allowed_hosts)
        self._key = _digest(api_key) if api_key else None
        self._rate = RateLimiter(rate_limit) if rate_limit else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except APIError as error:
            await error_response(error)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._hosts.check(headers.get("host", ""), headers.get("origin"))
        if not scope["path"].startswith(PROTECTED):
            return
        if self._rate is not None and (wait := self._rate.hit((scope.get("client") or ("",))[0])):
            message = f"too many requests from this address: wait {wait} s"
            raise APIError(429, message, code="rate_limit_exceeded", retry_after=wait)
        authorization = headers.get("authorization", "")
        scheme, _, key = authorization.partition(" ")
        if self._key and not (secrets.compare_digest(_digest(key.strip()), self._key) and scheme.lower() == "bearer"):
            problem = "the key is wrong" if authorization else "this server needs a key"
            raise APIError(401, f"{problem}: send the header Authorization: Bearer KEY", code="invalid_api_key")


def _digest(key: str) -> bytes:
    """A digest of fixed length: comparing takes the same time for keys of any length."""
    return hashlib.sha256(key.encode("utf-8")).digest()


class TrustedHosts:
    """The names that a request may call this server by, which no other site can have.

    On loopback these are loopback's names. Elsewhere any IP address is one too, since DNS rebinding needs a name.
    """

    def __init__(self, host: str, allowed_hosts: tuple[str, ...] = ()) -> None:
        self._names = {name.lower() for name in (host, *allowed_hosts)}
        self._any_address = not is_loopback(host)

    def check(self, host: str, origin: str | None) -> None:
        """Raises APIError for the Host header of another name, and for the Origin of another site's page."""
        name = _netloc(f"//{host}", "hostname").rstrip(".")
        if not (is_loopback(name) or name in self._names or (self._any_address and _address(name))):
            message = f"this server is not called {name[:100]!r}: add it with graft serve --allowed_hosts"
            raise APIError(403, message, code="host_not_allowed")
        if origin is not None and _netloc(origin, "netloc") != host.lower():
            raise APIError(403, "pages of other sites may not use this server", code="origin_not_allowed")


def _netloc(url: str, part: str) -> str:
    """The "netloc" or "hostname" of a URL, in lower case; "" for a malformed one."""
    try:
        return (getattr(urlsplit(url), part) or "").lower()
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    """Whether a host name or address always means this machine."""
    address = _address(name)
    return name == "localhost" or name.endswith(".localhost") if address is None else address.is_loopback


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


class RateLimiter:
    """At most N requests a minute from each client, by a sliding window of counters.

    Counters expire. limits' moving window, which is exact, keeps an entry of every client for ever.
    """

    def __init__(self, per_minute: int) -> None:
        self._limit = RateLimitItemPerMinute(per_minute)
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())

    def hit(self, client: str) -> int:
        """Count a request of `client`: 0 if it is admitted, else the seconds until the next one is."""
        key = _client_network(client)
        if self._window.hit(self._limit, key):
            return 0
        return max(1, math.ceil(self._window.get_window_stats(self._limit, key).reset_time - time.time()))


def _client_network(client: str) -> str:
    """An IPv6 client has a whole /64 of addresses."""
    try:
        return str(ip_network((client.partition("%")[0], 64), strict=False)) if ":" in client else client
    except ValueError:
        return client


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises APIError if it is not declared as JSON, too large or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(415, "send the body as JSON, with the header Content-Type: application/json")
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BODY_BYTES:
                    content += chunk
                elif size > MAX_DRAIN_BYTES:
                    break
    except TimeoutError:
        raise APIError(408, f"the body did not arrive within {BODY_TIMEOUT:.0f} s") from None
    except ClientDisconnect:
        raise APIError(499, "the client has disconnected") from None
    if size > MAX_BODY_BYTES:
        raise APIError(413, f"the body is too large: at most {MAX_BODY_BYTES} bytes", code="request_too_large")
    return bytes(content)
