"""The router's HTTP application: its own paths, and the OpenAI interface that it passes on. On the event loop's thread.

Requests are never logged with their bodies, which hold prompts and salts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from cachetier.core.bearer import carries_token
from cachetier.core.errors import ConfigError, ProtocolError
from cachetier.route.engine import Engine, Registration
from cachetier.route.fleet import Fleet
from cachetier.route.metrics import RouteMetrics
from cachetier.route.openai_error import error_response
from cachetier.route.proxy import Proxy
from cachetier.route.watch import Watch

MAX_BODY_BYTES = 64 << 20
PASSED_ON = ("/v1/{path:.*}", "/tokenize", "/detokenize")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)


class _NewEngine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    role: str
    url: str


class App:
    """The handlers and what they share."""

    def __init__(self, fleet: Fleet, watch: Watch, proxy: Proxy, metrics: RouteMetrics) -> None:
        self._fleet, self._watch, self._proxy, self._metrics = fleet, watch, proxy, metrics

    def application(self, token: str = "") -> web.Application:
        """Build the application; with a `token`, every request must carry it."""
        middlewares = [_authorized(token), _errors_as_json] if token else [_errors_as_json]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        app.router.add_get("/engines", self._list_engines)
        app.router.add_post("/engines", self._add_engine)
        app.router.add_delete("/engines/{name}", self._remove_engine)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/v1/models", self._list_models)
        for path in PASSED_ON:
            app.router.add_route("*", path, self._proxy.handle)
        return app

    async def _list_engines(self, _: web.Request) -> web.Response:
        return web.json_response([_public(engine) for engine in self._fleet.engines])

    async def _add_engine(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # what a page of another site can have a browser send is not
            raise ProtocolError("the body must be of type application/json", 415)
        try:
            new = msgspec.json.decode(await request.read(), type=_NewEngine)
            engine = self._fleet.put(Registration(new.name, new.role, new.url))
        except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
            raise ProtocolError(str(error)) from error
        await asyncio.shield(self._watch.look(engine))
        return web.json_response(_public(engine), status=201)

    async def _remove_engine(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if not self._fleet.remove(name):
            raise ProtocolError(f"there is no engine {name!r}", 404)
        return web.json_response({"removed": name})

    async def _health(self, _: web.Request) -> web.Response:
        num_up = sum(engine.is_up for engine in self._fleet.engines)
        return web.json_response({"engines_up": num_up}, status=200 if num_up else 503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": self._metrics.content_type})

    async def _list_models(self, _: web.Request) -> web.Response:
        cards: dict[str, Any] = {}
        for engine in self._fleet.engines:
            for name, card in engine.models.items() if engine.is_up else ():
                cards.setdefault(name, card)
        return web.json_response({"object": "list", "data": list(cards.values())})


def _public(engine: Engine) -> dict[str, Any]:
    return {
        "name": engine.name,
        "role": engine.role,
        "url": engine.url,
        "is_up": engine.is_up,
        "trouble": engine.trouble,
        "models": list(engine.models),
        "namespace": engine.namespace.hex(),
        "waiting": engine.num_waiting,
        "in_flight": engine.num_in_flight,
        "others": engine.num_others,
        "kv_usage": engine.kv_usage,
    }


def _authorized(token: str) -> Any:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not carries_token(request.headers.get("Authorization", ""), token):
            return error_response(401, "this router needs the header 'Authorization: Bearer TOKEN' with its token")
        return await handler(request)

    return check


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ProtocolError as error:
        return error_response(error.status, str(error))
    except web.HTTPNotFound:
        return error_response(404, "no such path; this router passes on /v1/..., /tokenize and /detokenize")
    except web.HTTPRequestEntityTooLarge:
        return error_response(413, f"the body may have {MAX_BODY_BYTES} bytes at most")
    except web.HTTPException as error:
        return error_response(error.status, error.reason)
    except ConnectionError:
        raise  # the client is gone
    except Exception:  # the boundary: one request fails, the router lives
        log.exception("%s %r failed", request.method, request.path)
        return error_response(500, "internal error; the router's log has more")
