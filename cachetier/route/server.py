"""The router's life: its configuration, its port, and an orderly end. One event loop on the main thread."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import signal
from collections.abc import AsyncIterator, Callable, Sequence

from aiohttp import web

from cachetier.core.errors import ConfigError
from cachetier.route.app import App
from cachetier.route.dispatch import Dispatch
from cachetier.route.engine import Engine, Registration
from cachetier.route.fleet import Fleet
from cachetier.route.metrics import RouteMetrics
from cachetier.route.prefills import Prefills
from cachetier.route.proxy import Proxy
from cachetier.route.upstream import Upstream
from cachetier.route.watch import Watch

BACKLOG = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Settings of `cachetier route`.

    Attributes:
        listen: HOST:PORT; port 0 takes a free one.
        token: what clients must send; needed where others than this machine's users reach the port.
        socket: of the server whose engines are used; empty: none is asked.
        registrations: engines that are there from the start.
        min_prefill_tokens: shorter prompts are prefilled where they are answered.
        drain_s: how long answers under way may take once the router is to end.

    Raises:
        ConfigError: from the constructor, when a value is impossible.
    """

    listen: str
    token: str = ""
    socket: str = ""
    registrations: Sequence[Registration] = ()
    min_prefill_tokens: int = 512
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        port = self.listen.rpartition(":")[2]
        if not self.host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"listen is {self.listen!r}; write HOST:PORT")
        if not self.token and not _is_loopback(self.host):
            raise ConfigError("listening beyond the loopback needs a token file: others could use the engines")

    @property
    def host(self) -> str:
        """The address to listen on."""
        return self.listen.rpartition(":")[0].strip("[]")


@contextlib.asynccontextmanager
async def routing(config: RouterConfig) -> AsyncIterator[tuple[str, Fleet]]:
    """Route within this context; yield the router's URL and its engines.

    At the end, take no more requests and let those under way end, for `drain_s` at most.

    Raises:
        ConfigError: the port cannot be used.
    """
    fleet = Fleet(config.registrations)
    metrics = RouteMetrics(fleet)
    async with Upstream(passes_authorization=not config.token) as upstream:
        watch = Watch(fleet, upstream, config.socket)
        prefills = Prefills(upstream, watch, metrics)
        proxy = Proxy(Dispatch(fleet, config.min_prefill_tokens), prefills, upstream, watch, metrics)
        app = App(fleet, watch, proxy, metrics).application(config.token)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=config.drain_s)
        await runner.setup()
        try:
            await watch.first_look()
            url = await _listen(runner, config)
            watching = asyncio.create_task(watch.run())
            try:
                yield url, fleet
            finally:
                watching.cancel()
        finally:
            await runner.cleanup()
            await prefills.close()
            await watch.close()


async def run(config: RouterConfig, on_ready: Callable[[str, list[Engine]], None]) -> None:
    """Route until SIGTERM or SIGINT; call `on_ready` once, with the router's URL and the engines that it knows.

    Raises:
        ConfigError: the port cannot be used.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with routing(config) as (url, fleet):
        on_ready(url, fleet.engines)
        await stopping.wait()


async def _listen(runner: web.AppRunner, config: RouterConfig) -> str:
    port = int(config.listen.rpartition(":")[2])
    try:
        await web.TCPSite(runner, config.host, port, backlog=BACKLOG).start()
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.listen}: {error}") from error
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{runner.addresses[0][1]}"


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
