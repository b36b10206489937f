"""Passes an engine's answer on to the client, as it comes. On the event loop.

Nothing is passed on before the first bytes of the body are there: until then another engine can answer instead.
"""

from typing import NamedTuple

import aiohttp
from aiohttp import web

from cachetier.route.openai_error import error_event
from cachetier.route.upstream import Failures, headers_for_client

EVENT_STREAM = "text/event-stream"
BROKEN_OFF = "the engine failed in the middle of this answer; it is incomplete, and was not sent to another engine"


class Relayed(NamedTuple):
    """An answer that the client has got; `trouble`: how the engine failed in the middle of it, or nothing."""

    response: web.StreamResponse
    trouble: str = ""


async def relay(request: web.Request, reply: aiohttp.ClientResponse, first: bytes, headers: dict[str, str]) -> Relayed:
    """Answer `request` with `reply`, whose body begins with `first`, and with further `headers`.

    If the engine fails on the way, a stream is ended with an error event; the connection of any other answer is cut, so
    that nobody takes it for a whole one.

    Raises:
        ConnectionError: the client is gone.
    """
    response = web.StreamResponse(status=reply.status, reason=reply.reason, headers=headers_for_client(reply.headers))
    response.headers.update(headers)
    await response.prepare(request)
    is_stream = reply.content_type == EVENT_STREAM
    data, held_back = first, b""
    while data:
        if is_stream:  # whole lines alone, so that an error event never follows half of one
            lines, newline, held_back = (held_back + data).rpartition(b"\n")
            data = lines + newline
        if data:
            await response.write(data)
        try:
            data = await reply.content.readany()
        except Failures as error:
            await _break_off(request, response, is_stream)
            return Relayed(response, str(error) or type(error).__name__)
    await response.write_eof(held_back)
    return Relayed(response)


async def _break_off(request: web.Request, response: web.StreamResponse, is_stream: bool) -> None:
    response.force_close()
    if is_stream:
        await response.write_eof(error_event(502, BROKEN_OFF))
    elif request.transport is not None:
        request.transport.abort()
