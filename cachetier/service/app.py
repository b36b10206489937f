"""The HTTP application: messages in, store calls, replies out. Everything runs on the event loop's thread.

Store calls are short and touch memory only, so they run right here, those in `SLOW` excepted; a thread hand-over would
cost more than most of them. What a call cannot do without waiting it returns as a function, for another thread.
Requests are never logged with their bodies, which hold prompts and salts.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from cachetier.core.bearer import carries_token
from cachetier.core.codec import PATH_OF, decode, encode
from cachetier.core.document_messages import (
    ListDocuments,
    MatchDocuments,
    RegisterDocument,
    RemoveDocument,
    SyncDocuments,
)
from cachetier.core.engine_messages import AnnounceEngine, ListEngines, SetRole
from cachetier.core.errors import ProtocolError
from cachetier.core.event_messages import FollowChanges
from cachetier.core.message_base import Message
from cachetier.core.messages import (
    API_VERSION,
    MAX_BODY_BYTES,
    Commit,
    Invalidate,
    Match,
    OpenSession,
    ReadsDirectly,
    RegisterNamespace,
    Release,
    Renew,
    Report,
    Reserve,
    Trim,
)
from cachetier.core.pool_messages import CheckPools, CommitPool, OfferPool
from cachetier.core.wait_messages import AwaitChunks, EndPromise
from cachetier.service import json_match
from cachetier.service.metrics import Metrics
from cachetier.service.news import News
from cachetier.service.sessions import WatchedSessions
from cachetier.store.store import Store

BODY_TYPES = ("application/msgpack", "application/x-msgpack")
JSON_TYPE = "application/json"
SLOW = (ListDocuments, FollowChanges)  # they look up on disk what they list

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Call = Callable[[Any], Message | Callable[[], Message] | Awaitable[Message]]

log = logging.getLogger(__name__)


class Service:
    """What the handlers share.

    Attributes:
        stopping: set when the server is about to end; open watches end with it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sessions = WatchedSessions(store)
        self.metrics = Metrics(store.stats)
        self.news = News(store.waiting)
        self.stopping = asyncio.Event()

    def application(self, token: str = "") -> web.Application:
        """Build the application; with a `token`, every request must carry it."""
        middlewares = [_authorized(token), _errors_as_json] if token else [_errors_as_json]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        store = self.store
        calls: dict[type[Message], Call] = {
            OpenSession: store.open_session,
            RegisterNamespace: store.register_namespace,
            Match: store.begin_match,
            Trim: store.trim,
            Release: store.release,
            Renew: store.renew,
            Reserve: store.reserve,
            Commit: self.news.after(store.commit),
            Invalidate: store.invalidate,
            Report: store.report,
            ReadsDirectly: store.reads_directly,
            OfferPool: store.offer_pool,
            CommitPool: store.commit_pool,
            CheckPools: store.check_pools,
            AwaitChunks: self.news.next,
            EndPromise: self.news.after(store.waiting.end_promise),
            RegisterDocument: store.documents.register,
            SyncDocuments: store.documents.sync,
            MatchDocuments: store.documents.match,
            ListDocuments: store.documents.listing,
            RemoveDocument: store.documents.remove,
            AnnounceEngine: store.engines.announce,
            ListEngines: store.engines.listing,
            SetRole: store.engines.set_role,
            FollowChanges: store.events.follow,
        }
        for kind, path in PATH_OF.items():
            handler = self._message_handler(kind, calls[kind])
            app.router.add_post(path, self._match_handler(handler) if kind is Match else handler)
        app.router.add_get(f"/v{API_VERSION}/session/{{session:[0-9]{{1,20}}}}/watch", self._watch)
        app.router.add_get(f"/v{API_VERSION}/stats", self._stats)
        app.router.add_get(f"/v{API_VERSION}/namespaces", self._namespaces)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        return app

    def _message_handler(self, kind: type[Message], call: Call) -> Handler:
        observe = self.metrics.observer(kind.__name__)

        async def handle(request: web.Request) -> web.Response:
            if request.content_type not in BODY_TYPES:
                raise ProtocolError(f"the body must be of type {BODY_TYPES[0]}", 415)
            body = await _read_body(request)
            start = time.perf_counter()
            message = decode(kind, body)
            answer = await asyncio.to_thread(call, message) if kind in SLOW else call(message)
            if callable(answer):  # it waits for another node; shielded, because it has to run to its end
                answer = await asyncio.shield(asyncio.to_thread(answer))
            elif isinstance(answer, Awaitable):
                answer = await answer
            body = encode(answer)
            observe(time.perf_counter() - start)
            return web.Response(body=body, content_type=BODY_TYPES[0])

        return handle

    def _match_handler(self, handle_message: Handler) -> Handler:
        observe = self.metrics.observer("JsonMatch")

        async def handle(request: web.Request) -> web.StreamResponse:
            if request.content_type != JSON_TYPE:
                return await handle_message(request)
            body = await _read_body(request)
            start = time.perf_counter()
            reply = await asyncio.to_thread(json_match.answer, self.store, body)
            observe(time.perf_counter() - start)
            return web.Response(body=reply, content_type=JSON_TYPE)

        return handle

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        session = int(request.match_info["session"])
        self.sessions.watch(session)
        try:
            response = web.StreamResponse()
            await response.prepare(request)
            await self.stopping.wait()  # cancelled when the connection drops
            return response
        finally:
            self.sessions.end(session)

    async def _stats(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self.store.stats()), content_type=JSON_TYPE)

    async def _namespaces(self, _: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self.store.namespaces()), content_type=JSON_TYPE)

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, _: web.Request) -> web.Response:
        if self.stopping.is_set():
            return web.json_response({"error": "the server is stopping"}, status=503)
        return web.json_response({"status": "ready"})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.exposition(), headers={"Content-Type": self.metrics.content_type})


async def _read_body(request: web.Request) -> bytes:
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise ProtocolError(f"the body may have {MAX_BODY_BYTES} bytes at most", 413)
    return await request.read()


def _authorized(token: str) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not carries_token(request.headers.get("Authorization", ""), token):
            return _error(401, "this port needs the header 'Authorization: Bearer TOKEN' with the server's token")
        return await handler(request)

    return check


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ProtocolError as error:
        return _error(error.status, str(error))
    except web.HTTPNotFound:
        return _error(404, f"no such path; this server speaks version {API_VERSION}: /v{API_VERSION}/...")
    except web.HTTPRequestEntityTooLarge:
        return _error(413, f"the body may have {MAX_BODY_BYTES} bytes at most")
    except web.HTTPException as error:
        return _error(error.status, error.reason)
    except Exception:  # the boundary: one request fails, the server lives
        log.exception("%s %r failed", request.method, request.path)
        return _error(500, "internal error; the server's log has more")


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
