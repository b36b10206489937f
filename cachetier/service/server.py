"""The server's life: sockets, the once-a-second tick, and an orderly end.

One event loop on the main thread. Only closing the store, which waits for the disk, runs on a thread of its own.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable

from aiohttp import web

from cachetier.core.config import ServerConfig
from cachetier.core.errors import ConfigError
from cachetier.service.app import Service
from cachetier.store.store import Store

TICK_S = 1.0
FLUSH_TIMEOUT_S = 6.0
CLOSE_TIMEOUT_S = 8.0
IDLE_CONNECTION_S = 3600.0
BACKLOG = 512

log = logging.getLogger(__name__)


async def run(
    config: ServerConfig, store: Store, on_ready: Callable[[], None], *, token: str = "", parent_pid: int = 0
) -> bool:
    """Serve `store` until SIGTERM or SIGINT, or until the process `parent_pid` is gone; then flush and close it.

    `token` is what TCP clients must send.

    Returns:
        Whether the store could be closed in time; if not, the process should end at once, and what was not flushed
        is lost.

    Raises:
        ConfigError: the socket or the port cannot be used. The store is closed.
    """
    service = Service(store)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stopping.set)
    runners: list[web.AppRunner] = []
    try:
        runners.append(await _listen_unix(service, config.socket))
        if config.tcp:
            runners.append(await _listen_tcp(service, config.tcp, token))
        store.data_dir.publish(store.instance, os.path.abspath(config.socket))
        on_ready()
        await _tick_until_stopped(service, parent_pid)
    finally:
        service.stopping.set()
        if runners:  # the socket is ours, and still so while the store holds the data directory's lock
            with contextlib.suppress(FileNotFoundError):
                os.unlink(config.socket)
        for runner in runners:
            await runner.cleanup()
        is_closed = await _close(store)
    return is_closed


async def _tick_until_stopped(service: Service, parent_pid: int) -> None:
    while not service.stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.stopping.wait(), TICK_S)
        try:
            service.sessions.renew()
            service.store.expire()
        except Exception:  # the boundary of the tick: the next one may succeed
            log.exception("expiring leases failed")
        if parent_pid and os.getppid() != parent_pid:
            log.info("the engine that started this server is gone: stopping")
            service.stopping.set()


async def _close(store: Store) -> bool:
    closer = concurrent.futures.ThreadPoolExecutor(1)  # not the loop's own, whose end would wait for it
    closing = asyncio.get_running_loop().run_in_executor(closer, store.close, FLUSH_TIMEOUT_S)
    try:
        await asyncio.wait_for(asyncio.shield(closing), CLOSE_TIMEOUT_S)
    except TimeoutError:
        log.warning("the disk hangs: the store did not close within %.0f s", CLOSE_TIMEOUT_S)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(store.data_dir.arena_path())  # or its memory would stay taken until the next start
        return False
    return True


async def _listen_unix(service: Service, path: str) -> web.AppRunner:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_the_way(path)
        listener.bind(path)
        os.chmod(path, 0o600)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on the socket {path}: {error.strerror}") from error
    runner = _runner(service.application())
    await runner.setup()
    await web.SockSite(runner, listener, backlog=BACKLOG).start()
    return runner


def _clear_the_way(path: str) -> None:
    """Make the socket's folder if need be, and remove the socket that a killed server left."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is no socket; name another one with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # somebody is there and slow
    raise ConfigError(f"another server listens on {path}; stop it, or name another socket with --socket")


async def _listen_tcp(service: Service, address: str, token: str) -> web.AppRunner:
    host, _, port = address.rpartition(":")
    runner = _runner(service.application(token))
    await runner.setup()
    try:
        await web.TCPSite(runner, host.strip("[]") or None, int(port), backlog=BACKLOG).start()
    except (OSError, OverflowError) as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on tcp {address}: {error}") from error
    return runner


def _runner(app: web.Application) -> web.AppRunner:
    return web.AppRunner(
        app, access_log=None, handler_cancellation=True, keepalive_timeout=IDLE_CONNECTION_S, shutdown_timeout=1.0
    )
