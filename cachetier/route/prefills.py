"""The producers' part of a hand-over: prompts sent to them while the consumers' answers are under way.

On the event loop. Nobody reads what comes back: a producer's work is in the tier. What fails here is counted and
logged, and the consumer computes what it does not find.
"""

import asyncio
import logging
import time

from multidict import CIMultiDict

from cachetier.route.engine import Engine
from cachetier.route.metrics import PREFILL, RouteMetrics
from cachetier.route.openai_request import OpenAIRequest
from cachetier.route.upstream import Failures, Upstream
from cachetier.route.watch import Watch

TIMEOUT_S = 900.0  # nobody waits for it as long, so it would only pile up

log = logging.getLogger(__name__)


class Prefills:
    """Those that are under way."""

    def __init__(self, upstream: Upstream, watch: Watch, metrics: RouteMetrics) -> None:
        self._upstream, self._watch, self._metrics = upstream, watch, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, producer: Engine, path: str, asked: OpenAIRequest, headers: CIMultiDict[str]
    ) -> "asyncio.Task[None]":
        """Send a prompt to `producer`; cancelling the task aborts it there."""
        task = asyncio.create_task(self._prefill(producer, path, asked, headers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Abort all."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _prefill(self, producer: Engine, path: str, asked: OpenAIRequest, headers: CIMultiDict[str]) -> None:
        started, trouble = time.monotonic(), ""
        self._metrics.requests.labels(producer.name, PREFILL).inc()
        with producer.busy(asked.num_tokens):
            try:
                async with (
                    asyncio.timeout(TIMEOUT_S),
                    self._upstream.send(producer, "POST", path, asked.for_producer(), headers) as reply,
                ):
                    await reply.read()
                    if reply.status >= 500:
                        trouble = f"it says {reply.status}"
            except Failures as error:
                trouble = str(error) or type(error).__name__
                self._watch.look(producer)
        if trouble:
            self._metrics.failures.labels(producer.name, PREFILL).inc()
            log.warning("engine %s did not prefill a prompt, its consumer will: %s", producer.name, trouble)
        else:
            self._metrics.seconds.labels(PREFILL).observe(time.monotonic() - started)
