"""Counters and histograms of the server in Prometheus' text format, under vLLM's names with `graft:` (GET /metrics)."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftlm.inference.engine import Engine
from graftlm.inference.requests import Completion, Request, RequestHandle, TokenOutput

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """What is measured of one engine's requests."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        labels, registry = ("route", "status"), self._registry
        self.http = Counter("graft:http_requests", "Responses by route and status", labels, registry=registry)
        self._prompt = Counter("graft:prompt_tokens", "Tokens of finished requests' prompts", registry=registry)
        self._generated = Counter("graft:generation_tokens", "Tokens generated", registry=registry)
        self._first = Histogram(
            "graft:time_to_first_token_seconds", "From a request to its first token", registry=registry, buckets=SECONDS
        )
        self._speed = Histogram(
            "graft:tokens_per_second", "Of each answer after its first token", registry=registry, buckets=SPEEDS
        )
        for name in ("running", "waiting"):
            gauge = Gauge(f"graft:num_requests_{name}", f"Requests {name}", registry=registry)
            gauge.set_function(partial(self._now, name))

    def _now(self, name: str) -> float:
        return float(self._engine.stats().get(name, 0))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)

    def submit(self, request: Request, on_output: Callable[[TokenOutput], None] | None = None) -> RequestHandle:
        """`Engine.submit`, measured."""
        begin, tokens = time.monotonic(), list[float]()

        def observe(output: TokenOutput) -> None:
            if output.token is not None:
                tokens.append(time.monotonic())
                self._generated.inc()
                if len(tokens) == 1:
                    self._first.observe(tokens[0] - begin)
            if on_output is not None:
                on_output(output)

        def finish(done: "Future[Completion]") -> None:
            if done.exception() is None:
                self._prompt.inc(done.result().prompt_tokens)
            if len(tokens) > 1 and tokens[-1] > tokens[0]:
                self._speed.observe((len(tokens) - 1) / (tokens[-1] - tokens[0]))

        handle = self._engine.submit(request, observe)
        handle.done.add_done_callback(finish)
        return handle


class MetricsMiddleware:
    """ASGI middleware: counts each response by its route and status. Paths of no route count as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Starlette) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.http.labels(self._route(scope), str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)

    def _route(self, scope: Scope) -> str:
        if "route" in scope:
            return str(scope["route"].path)
        return scope["path"] if scope["path"] in {getattr(r, "path", "") for r in self._routes.routes} else "other"
