"""One request's way through the router: to a producer and a consumer at the same time, and the answer back.

On the event loop's thread. The client's going away cancels the handler, which closes the connection to the consumer
and, before the answer has begun, to the producer, on which these abort the request. A producer's failure is no failure
of the request: the consumer computes what it does not find. A consumer's is one only when a part of the answer was
passed on, or when no other consumer is left.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from cachetier.route.choice import are_paired
from cachetier.route.dispatch import Dispatch
from cachetier.route.engine import Engine
from cachetier.route.metrics import DECODE, RouteMetrics
from cachetier.route.openai_error import error_response
from cachetier.route.openai_request import OpenAIRequest, read_request
from cachetier.route.prefills import Prefills
from cachetier.route.relay import relay
from cachetier.route.upstream import Failures, Upstream
from cachetier.route.watch import Watch

# What an engine says that cannot take a request now, or a proxy before it. It has not begun with it.
UNAVAILABLE = (502, 503)
CONSUMER_HEADER, PRODUCER_HEADER = "X-Cachetier-Consumer", "X-Cachetier-Producer"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Trip:
    """A request under way: what came, and how it goes on; `producer` prefills it, unless that is None."""

    request: web.Request
    asked: OpenAIRequest
    path: str
    headers: CIMultiDict[str]
    started_s: float
    producer: Engine | None = None


class _Begun(NamedTuple):
    """An answer that has begun: whose, the first bytes of its body (none if that is empty), and headers to add."""

    consumer: Engine
    reply: aiohttp.ClientResponse
    first: bytes
    headers: dict[str, str]


class Proxy:
    """Passes requests on."""

    def __init__(
        self, dispatch: Dispatch, prefills: Prefills, upstream: Upstream, watch: Watch, metrics: RouteMetrics
    ) -> None:
        self._dispatch, self._prefills, self._upstream = dispatch, prefills, upstream
        self._watch, self._metrics = watch, metrics

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request of the OpenAI interface.

        Raises:
            ProtocolError: it names an engine that there is not.
        """
        started_s = time.monotonic()
        asked = read_request(request.path, await request.read())
        producer = self._dispatch.named_producer(asked)
        consumer = self._dispatch.consumer(asked, producer)
        if consumer is None:
            return error_response(*self._dispatch.refusal(asked), {"Retry-After": "1"})
        producer = producer or self._dispatch.producer(asked, consumer)
        if producer is not None and not are_paired(producer, consumer):
            producer = None
        path, headers = str(request.rel_url), self._upstream.headers_for_engine(request.headers)
        trip = _Trip(request, asked, path, headers, started_s, producer)
        prefill = None
        if producer is not None:
            self._dispatch.note_producer(asked, producer)
            prefill = self._prefills.start(producer, path, asked, headers)
        try:
            begun = await self._begin(trip, consumer)
        except asyncio.CancelledError:
            self._metrics.gone.inc()
            if prefill is not None:
                prefill.cancel()
            raise
        # From here on the consumer has the whole prompt, and the producer may finish what the tier is to keep. Nor
        # could a client that goes away be told from one that hangs up because it has all it wanted.
        return begun if isinstance(begun, web.StreamResponse) else await self._pass_on(trip, begun)

    async def _begin(self, trip: _Trip, consumer: Engine | None) -> _Begun | web.StreamResponse:
        """Have `consumer` answer, or another one if it cannot, each once; return an error if all have failed."""
        tried: list[Engine] = []
        while consumer is not None:
            self._metrics.retries.inc(bool(tried))
            tried.append(consumer)
            has_others = self._dispatch.consumer(trip.asked, trip.producer, tried) is not None
            begun = await self._try(trip, consumer, has_others)
            if begun is not None:
                return begun
            consumer = self._dispatch.consumer(trip.asked, trip.producer, tried)
        names = ", ".join(engine.name for engine in tried)
        text = f"{names} failed before the answer began, and no other engine is left"
        return error_response(503, text, {"Retry-After": "1"})

    async def _try(self, trip: _Trip, consumer: Engine, has_others: bool) -> _Begun | None:
        """Have `consumer` answer; None: it failed before the answer began."""
        self._dispatch.note_consumer(trip.asked, consumer)
        self._metrics.requests.labels(consumer.name, DECODE).inc()
        headers = {CONSUMER_HEADER: consumer.name}
        # Another consumer than the one that the producer was chosen for may have other weights.
        if trip.producer is not None and are_paired(trip.producer, consumer):
            headers[PRODUCER_HEADER] = trip.producer.name
        body = trip.asked.for_consumer(headers.get(PRODUCER_HEADER, ""))
        with consumer.busy(trip.asked.num_tokens):
            try:
                reply, first = await self._send(trip, consumer, body)
            except Failures as error:
                self._watch.look(consumer)
                self._count_failure(consumer, str(error) or type(error).__name__)
                return None
        if reply.status in UNAVAILABLE and has_others:
            reply.close()
            self._count_failure(consumer, f"it says {reply.status}")
            return None
        self._metrics.first_byte_s.observe(time.monotonic() - trip.started_s)
        return _Begun(consumer, reply, first, headers)

    async def _send(self, trip: _Trip, consumer: Engine, body: bytes) -> tuple[aiohttp.ClientResponse, bytes]:
        """Return the beginning of an answer and the first bytes of its body."""
        reply = await self._upstream.send(consumer, trip.request.method, trip.path, body, trip.headers)
        try:
            return reply, await reply.content.readany()
        except BaseException:
            reply.close()
            raise

    async def _pass_on(self, trip: _Trip, begun: _Begun) -> web.StreamResponse:
        with begun.consumer.busy(trip.asked.num_tokens), contextlib.closing(begun.reply):
            relayed = await relay(trip.request, begun.reply, begun.first, begun.headers)
        if relayed.trouble:
            self._watch.look(begun.consumer)
            self._count_failure(begun.consumer, f"in the middle of an answer: {relayed.trouble}")
        else:
            self._metrics.seconds.labels(DECODE).observe(time.monotonic() - trip.started_s)
        return relayed.response

    def _count_failure(self, consumer: Engine, trouble: str) -> None:
        self._metrics.failures.labels(consumer.name, DECODE).inc()
        log.warning("engine %s did not answer: %s", consumer.name, trouble)
