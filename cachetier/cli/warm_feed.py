"""The bridge between the blocking reader of `cachetier warm` and its event loop: one thread, one bounded queue."""

import asyncio
import threading
from collections.abc import Iterator

from cachetier.cli.warm_input import Prompt, Rejected


class PromptFeed:
    """Prompts handed from a reader thread to the event loop, `capacity` ahead at most.

    The thread is a daemon: one that waits for standard input must not keep the process from ending.
    """

    def __init__(self, prompts: Iterator[Prompt | Rejected], capacity: int) -> None:
        """Start reading; call it on the event loop."""
        self._prompts = prompts
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Prompt | Rejected | BaseException | None] = asyncio.Queue()
        self._free = threading.Semaphore(capacity)
        self._is_closed = False
        threading.Thread(target=self._read, name="warm-reader", daemon=True).start()

    async def get(self) -> Prompt | Rejected | None:
        """Return the next prompt; None after the last, to every caller."""
        item = await self._queue.get()
        self._free.release()
        if item is None:
            self._queue.put_nowait(None)
        elif isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead."""
        self._is_closed = True
        self._free.release()

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            for item in self._prompts:
                self._free.acquire()
                if self._is_closed:
                    return
                self._hand_over(item)
        except BaseException as error:
            end = error
        self._hand_over(end)

    def _hand_over(self, item: Prompt | Rejected | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop was closed while this thread waited for input
            self._is_closed = True
