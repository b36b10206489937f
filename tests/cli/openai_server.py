"""A small server that speaks the part of vLLM's OpenAI interface that a warm-up uses, with faults on request."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

MAX_MODEL_LEN = 1000


class FakeEngine:
    """The server and what it saw. Tokens are characters, or the list's elements.

    Attributes:
        models: names it serves.
        cards: what else it says of some of them.
        delay_s: how long a prompt takes.
        replies: statuses to answer the next prompts with instead of computing them.
        headers: of those answers.
        requests: path and body of every prompt that was computed, in order.
        num_tokenized: texts that it was asked to turn into tokens.
        tokenize_replies: statuses to answer the next of these with.
        most_in_flight: the most prompts there were at once.
    """

    def __init__(self) -> None:
        self.models = ["tiny"]
        self.cards: dict[str, dict[str, str]] = {}
        self.key = ""
        self.delay_s = 0.0
        self.replies: list[int] = []
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.most_in_flight = 0
        self.num_connections_dropped = 0
        self.num_tokenized = 0
        self.tokenize_replies: list[int] = []
        self.url = ""
        self.socket = ""
        self.counters = {"stored": 0, "hit": {"host": 0, "disk": 0}}
        self._in_flight = 0
        self._lock = threading.Lock()

    def texts(self) -> list[Any]:
        """Return the prompts that were computed."""
        return [body.get("prompt", body.get("messages")) for _, body in self.requests]

    async def list_models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        return web.json_response(
            {"object": "list", "data": [{"id": name, **self.cards.get(name, {})} for name in self.models]}
        )

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            return self._answer(request, body)
        finally:
            with self._lock:
                self._in_flight -= 1

    async def tokenize(self, request: web.Request) -> web.Response:
        """Tokens are the numbers of characters; a special token 1 stands before a text unless it is not wanted."""
        body = await request.json()
        self.num_tokenized += 1
        if self.tokenize_replies:
            return web.json_response({"error": {"message": "busy"}}, status=self.tokenize_replies.pop(0))
        text = body["prompt"] if "prompt" in body else "".join(f"<{m['content']}>" for m in body["messages"])
        special = [1] if "prompt" in body and body.get("add_special_tokens", True) else []
        tokens = [*special, *map(ord, text)]
        return web.json_response({"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens})

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response({"tokens": {"queried": 1, **self.counters}, "chunks": 3})

    def _answer(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        if self.replies:
            status = self.replies.pop(0)
            if status == 0:
                self.num_connections_dropped += 1
                assert request.transport is not None
                request.transport.abort()
            return web.json_response({"error": {"message": "busy"}}, status=status or 500, headers=self.headers)
        prompt = body.get("prompt", body.get("messages"))
        num_tokens = len(prompt) if "prompt" in body else sum(len(message["content"]) for message in prompt)
        if num_tokens == MAX_MODEL_LEN:
            return web.json_response({"error": {"message": "max_tokens must be at least 1, got 0."}}, status=400)
        if num_tokens > MAX_MODEL_LEN:
            text = f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, you sent {num_tokens}."
            return web.json_response({"error": {"message": text, "type": "BadRequestError"}}, status=400)
        if prompt == "refuse me":
            return web.json_response({"error": {"message": "bad grammar"}}, status=400)
        self.requests.append((request.path, body))
        self.counters["stored"] += num_tokens
        return web.json_response({"choices": [{}], "usage": {"prompt_tokens": num_tokens, "completion_tokens": 1}})


@contextmanager
def running(engine: FakeEngine, socket: str = "") -> Iterator[FakeEngine]:
    """Run `engine` on a free port in a thread of its own, and its counters on a Unix socket if one is named."""
    loop = asyncio.new_event_loop()
    runners: list[web.AppRunner] = []

    async def start() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", engine.list_models)
        app.router.add_post("/v1/completions", engine.complete)
        app.router.add_post("/tokenize", engine.tokenize)
        app.router.add_post("/v1/chat/completions", engine.complete)
        app.router.add_get("/v1/stats", engine.stats)
        runners.append(web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True))
        await runners[0].setup()
        await web.TCPSite(runners[0], "127.0.0.1", 0).start()
        if socket:
            await web.UnixSite(runners[0], socket).start()
            engine.socket = socket
        engine.url = f"http://127.0.0.1:{runners[0].addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield engine
    finally:
        asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
