"""Connections to engines: which headers go there and come back, and what a failure is. On the event loop."""

import os
import socket
from collections.abc import Mapping
from typing import Any

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from cachetier.route.engine import Engine

API_KEY_VARIABLE = "VLLM_API_KEY"  # the variable from which `vllm serve` itself takes its key
CONNECT_TIMEOUT_S = 5.0
LIMIT_HEADER_BYTES = 64 << 10

# A peer that vanished without a word, with its power or its network, is given up after 25 s of silence on the wire.
# Engines may think for minutes, so there is no limit on the time between two bytes of an answer.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 25_000}

# What belongs to one connection and not to the message (RFC 9110, 7.6.1), and what aiohttp writes itself. A request's
# encoding is undone before the router sees it.
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer")
) | {"transfer-encoding", "upgrade"}
_NOT_FOR_ENGINES = _HOP_BY_HOP | {"host", "content-length", "content-encoding", "expect"}

# That an engine cannot be reached, hangs up or speaks no HTTP. What it answers is never one.
Failures = (aiohttp.ClientError, TimeoutError, OSError)


class Upstream:
    """The HTTP client for all engines; use as an asynchronous context manager."""

    def __init__(self, *, passes_authorization: bool) -> None:
        """Make one; `passes_authorization`: clients' Authorization headers are meant for the engines."""
        self._passes_authorization = passes_authorization
        key = os.environ.get(API_KEY_VARIABLE)
        self._own = {"Authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> "Upstream":
        # A kept connection may be closed by the engine just when it is used again, and then nobody could tell whether
        # the request had arrived. A new one costs far less than any prefill.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_watched_socket)
        self._http = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Content-Type"),
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=LIMIT_HEADER_BYTES,
            max_field_size=LIMIT_HEADER_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    def send(
        self, engine: Engine, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> "aiohttp.client._RequestContextManager":
        """Send a request; `path` is as the client wrote it, query included. May fail with any of `Failures`."""
        url = URL(engine.url + path, encoded=True)
        return self._http.request(method, url, data=body or None, headers=headers, allow_redirects=False)

    async def get(self, engine: Engine, path: str) -> tuple[int, bytes]:
        """Ask an engine something in the router's own name; return status and body. May fail with any of `Failures`."""
        async with self.send(engine, "GET", path, b"", self._own) as reply:
            return reply.status, await reply.read()

    def headers_for_engine(self, headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
        """Return the headers of a client's request as an engine is to see them."""
        kept = CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _NOT_FOR_ENGINES)
        if not self._passes_authorization:
            kept.popall("Authorization", None)
            kept.update(self._own)
        return kept


def headers_for_client(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return the headers of an engine's answer as the client is to see them."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP)


def _watched_socket(address: tuple[Any, ...]) -> socket.socket:
    connection = socket.socket(*address[:3])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
