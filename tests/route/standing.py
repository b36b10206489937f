"""Stand-in engines that speak the part of vLLM's interface that a router uses, with faults on request, and a router.

All of a test runs in one event loop: engines, router and clients, over real sockets.
"""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from cachetier.route.engine import Registration
from cachetier.route.fleet import Fleet
from cachetier.route.server import RouterConfig, routing

LONG = "a prompt that is worth a hand-over " * 100
SHORT = "a short prompt"
TEST_TIMEOUT_S = 50


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), TEST_TIMEOUT_S))

    return run


async def eventually(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


class StandIn:
    """An engine. Its answer to a prompt is its name and five words, as a stream if it is asked for one.

    Attributes:
        models: names that it serves.
        requests: body and headers of every prompt, in order.
        num_aborted: prompts whose connection was closed before the end of the answer.
        gate: while it is not set, nothing is answered.
        word_gate: the same between the first word of a stream and the others.
        statuses: what to answer the next prompts with instead.
        breaks: hang up on the next prompts: before the answer ("start"), or after its first word ("middle").
        is_healthy: what /health says.
        num_running, num_waiting: what /metrics says.
    """

    def __init__(self, name: str, role: str = "consumer", models: tuple[str, ...] = ("small",)) -> None:
        self.name, self.role, self.models = name, role, list(models)
        self.requests: list[tuple[dict[str, Any], Any]] = []
        self.num_aborted = 0
        self.gate, self.word_gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.word_gate.set()
        self.statuses: list[int] = []
        self.breaks: list[str] = []
        self.is_healthy = True
        self.num_running = self.num_waiting = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def registration(self) -> Registration:
        return Registration(self.name, self.role, self.url)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for body, _ in self.requests]

    def wishes(self, number: int = -1) -> dict[str, Any]:
        """Return what a prompt asks of cachetier."""
        return (self.bodies[number].get("kv_transfer_params") or {}).get("cachetier") or {}

    async def start(self) -> None:
        """Listen, on the same port as before if it did."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/half", self._half)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._complete)
        app.router.add_route("*", "/{path:.*}", self._echo)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuse connections from now on, and cut those that there are."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_healthy else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        lines = [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            f'vllm:num_requests_running{{engine="0",model_name="small"}} {self.num_running}.0',
            f'vllm:num_requests_waiting{{engine="0",model_name="small"}} {self.num_waiting}.0',
            'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 77.0',
            'vllm:kv_cache_usage_perc{engine="0",model_name="small"} 0.25',
        ]
        return web.Response(text="\n".join(lines))

    async def _list_models(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": name, "max_model_len": 4096} for name in self.models]}
        )

    async def _echo(self, request: web.Request) -> web.Response:
        body = await request.text()
        return web.json_response(
            {"engine": self.name, "method": request.method, "path": str(request.rel_url), "body": body}
        )

    async def _half(self, request: web.Request) -> web.StreamResponse:
        """Hang up in the middle of a body whose length nobody was told."""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b"[1, 2")
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((body, request.headers))
        try:
            await self.gate.wait()
            return await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.num_aborted += 1
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.statuses:
            text = {"error": {"message": f"from {self.name}", "type": "Odd", "param": None, "code": 1}}
            return web.json_response(text, status=self.statuses.pop(0), headers={"X-Odd": "yes"})
        assert request.transport is not None
        how = self.breaks.pop(0) if self.breaks else ""
        if how == "start":
            request.transport.abort()
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": self.name}], "max_tokens": body.get("max_tokens")})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for word in (self.name, *range(5)):
            await response.write(b"data: " + json.dumps({"choices": [{"text": f"{word} "}]}).encode() + b"\n\n")
            if how == "middle":
                await response.write(b'data: {"half of an ev')
                await asyncio.sleep(0.05)
                request.transport.abort()
            await self.word_gate.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


class Answer:
    """An answer of the router, read to its end.

    Attributes:
        text: what the engine's words were, joined.
        error: the object in its error event or body, if there is one.
    """

    def __init__(self, reply: aiohttp.ClientResponse, body: bytes) -> None:
        self.status, self.headers, self.body = reply.status, reply.headers, body
        self.text, self.error, self.is_done = "", None, False
        for line in body.split(b"\n"):
            data = line.removeprefix(b"data: ")
            if data == b"[DONE]":
                self.is_done = True
            elif data.strip():
                fields = json.loads(data)
                self.error = fields.get("error", self.error) if isinstance(fields, dict) else None
                self.text += "".join(choice["text"] for choice in fields.get("choices", ()))

    @property
    def consumer(self) -> str:
        return str(self.headers.get("X-Cachetier-Consumer", ""))

    @property
    def producer(self) -> str:
        return str(self.headers.get("X-Cachetier-Producer", ""))


class Router:
    """A running router, and a client of it."""

    def __init__(self, url: str, fleet: Fleet, http: aiohttp.ClientSession) -> None:
        self.url, self.fleet, self.http = url, fleet, http

    async def ask(self, prompt: Any = LONG, path: str = "/v1/completions", **fields: Any) -> Answer:
        """Send a prompt and read the answer."""
        body = {"model": "small", "prompt": prompt} | fields
        async with self.http.post(self.url + path, json=body) as reply:
            return Answer(reply, await reply.read())

    async def metric(self, line: str) -> float:
        """Return the value of the metric whose line begins so; 0 if there is none."""
        async with self.http.get(self.url + "/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return next((float(each.rpartition(" ")[2]) for each in lines if each.startswith(line)), 0.0)

    def is_up(self, name: str) -> bool:
        return any(engine.name == name and engine.is_up for engine in self.fleet.engines)


@contextlib.asynccontextmanager
async def standing(*engines: StandIn, **settings: Any) -> AsyncIterator[Router]:
    """Start the engines and a router in front of them."""
    for engine in engines:
        await engine.start()
    registrations = tuple(engine.registration for engine in engines)
    config = RouterConfig(**({"listen": "127.0.0.1:0", "registrations": registrations, "drain_s": 0.1} | settings))
    try:
        async with routing(config) as (url, fleet), aiohttp.ClientSession() as http:
            yield Router(url, fleet, http)
    finally:
        for engine in engines:
            await engine.stop()
