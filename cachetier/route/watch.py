"""Keeps the fleet true: looks at every engine once a second, and asks the server who is there and in which role.

On the event loop, but for the question to the server, whose client blocks and has a thread lent for it. Each engine is
looked at on its own: one that hangs delays the sight of no other. After a failed request it is looked at at once, so
that one that is gone is out within milliseconds; who answers its health check again is back.
"""

import asyncio
import logging
import time
from typing import Any

import msgspec

from cachetier.client.client import Client
from cachetier.core.engine_messages import ListEngines
from cachetier.core.errors import CachetierError
from cachetier.route.engine import UNSEEN, Engine
from cachetier.route.fleet import Fleet
from cachetier.route.upstream import Failures, Upstream

INTERVAL_S = 1.0
LOOK_TIMEOUT_S = 5.0
MODELS_INTERVAL_S = 10.0  # adapters come and go
SERVER_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class Watch:
    """Looks, until it is cancelled."""

    def __init__(self, fleet: Fleet, upstream: Upstream, socket_path: str) -> None:
        """Do nothing yet; an empty `socket_path` means that no server is asked."""
        self._fleet, self._upstream = fleet, upstream
        self._client = Client(socket_path) if socket_path else None
        self._server_answers = True
        self._looks: dict[Engine, asyncio.Task[None]] = {}
        self._question: asyncio.Task[None] | None = None

    async def first_look(self) -> None:
        """Learn what there is to know at once, so that the first request finds it."""
        if self._client is not None:
            await self._ask_server(self._client)
        await asyncio.gather(*map(self.look, self._fleet.engines))

    async def run(self) -> None:
        """Look once a second."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            if self._client is not None and (self._question is None or self._question.done()):
                self._question = asyncio.create_task(self._ask_server(self._client))
            for engine in self._fleet.engines:
                self.look(engine)

    def look(self, engine: Engine) -> "asyncio.Task[None]":
        """Look at an engine now, unless somebody does already; return the task that does."""
        task = self._looks.get(engine)
        if task is None:
            task = self._looks[engine] = asyncio.create_task(self._look(engine))
            task.add_done_callback(lambda _: self._looks.pop(engine))
        return task

    async def close(self) -> None:
        """Stop what is under way."""
        tasks = [*self._looks.values(), *filter(None, [self._question])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            self._client.close()

    async def _look(self, engine: Engine) -> None:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                trouble = await self._examine(engine)
        except (*Failures, ValueError) as error:  # the last: numbers that are none
            trouble = str(error) or type(error).__name__
        _note(engine, trouble)

    async def _examine(self, engine: Engine) -> str:
        """Take over what the engine says of itself; return what is wrong with it, or nothing."""
        status, _ = await self._upstream.get(engine, "/health")
        if status != 200:
            return f"its /health says {status}"
        if not engine.is_up or time.monotonic() >= engine.models_due_s:
            status, body = await self._upstream.get(engine, "/v1/models")
            if status != 200:
                return f"its /v1/models says {status}" + (", set VLLM_API_KEY" if status == 401 else "")
            engine.models = models_of(body)
            engine.models_due_s = time.monotonic() + MODELS_INTERVAL_S
        status, body = await self._upstream.get(engine, "/metrics")
        if status == 200:
            num_running, engine.num_waiting, engine.kv_usage = load_of(body)
            engine.num_others = max(0, num_running + engine.num_waiting - engine.num_in_flight)
        return "" if engine.models else "it serves no model"

    async def _ask_server(self, client: Client) -> None:
        try:
            reply = await asyncio.to_thread(client.call, ListEngines(), SERVER_TIMEOUT_S)
        except CachetierError as error:  # what was known stays so: the engines serve without it
            if self._server_answers:
                log.warning("the list of engines stays as it is: %s", error)
            self._server_answers = False
            return
        self._server_answers = True
        self._fleet.update(reply.engines)


def _note(engine: Engine, trouble: str) -> None:
    if not trouble and not engine.is_up:
        log.info("engine %s is up, a %s that serves %s", engine.name, engine.role, ", ".join(engine.models))
    elif trouble and engine.trouble in ("", UNSEEN):
        log.warning("engine %s is out: %s", engine.name, trouble)
    engine.trouble = trouble


class _Models(msgspec.Struct, frozen=True):
    data: list[dict[str, Any]]


def models_of(body: bytes) -> dict[str, Any]:
    """Return the cards in an answer of /v1/models by name, the base model's first; none if it is something else."""
    try:
        return {str(card["id"]): card for card in msgspec.json.decode(body, type=_Models).data}
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return {}


def load_of(exposition: bytes) -> tuple[int, int, float]:
    """Return an engine's running and waiting requests and the used share of its KV blocks, from its /metrics.

    Data-parallel ranks say so each: requests are added, and the fullest rank counts. What it does not say is 0.
    """
    values: dict[bytes, list[float]] = {
        b"vllm:num_requests_running": [],
        b"vllm:num_requests_waiting": [],
        b"vllm:kv_cache_usage_perc": [],
    }
    for line in exposition.splitlines():
        if line.startswith(b"vllm:"):
            name = line[: min(filter(lambda at: at > 0, (line.find(b"{"), line.find(b" "))), default=0)]
            if name in values:
                values[name].append(float(line.rpartition(b" ")[2]))
    running, waiting, usages = values.values()
    return int(sum(running)), int(sum(waiting)), max(usages, default=0.0)
