"""Answers those who wait for chunks as soon as there is news, without a thread for each. On the event loop's thread.

Chunks are stored, and promises end, by messages; after each of these everybody who waits looks again. What ends by time
or with a session is noticed by the next question, which a client asks a moment later.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

from cachetier.core.message_base import Message
from cachetier.core.wait_messages import AwaitChunks, AwaitChunksReply
from cachetier.store.waiting import Waiting

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)


class News:
    """What wakes those who wait."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._changed = asyncio.Event()

    def after(self, call: Callable[[Request], Reply]) -> Callable[[Request], Reply]:
        """Return `call` such that everybody who waits looks again after it."""

        def call_and_wake(message: Request) -> Reply:
            try:
                return call(message)
            finally:
                self._changed.set()
                self._changed = asyncio.Event()

        return call_and_wake

    async def next(self, message: AwaitChunks) -> AwaitChunksReply:
        """Answer with the next news, or after the message's time with none."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + message.within_s
        while True:
            reply, changed = self._waiting.news(message), self._changed
            if reply.news or loop.time() >= deadline_s:
                return reply
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline_s):
                    await changed.wait()
