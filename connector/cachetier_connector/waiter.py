"""The scheduler half's second link thread: it asks the server, again and again, what has become of awaited chunks.

A thread and a connection of its own, because the server answers when there is news and matches must not queue behind
that. It connects when something is waited for for the first time.

Locking design: the matcher's thread and the scheduler's add and remove tickets under `_lock`; this thread alone writes
a ticket's `news` and `is_lost`, which the scheduler's thread reads.
"""

import itertools
import logging
import threading

from cachetier.core.wait_messages import AwaitChunks, AwaitChunksReply
from cachetier_connector.link import ServerLink
from cachetier_connector.requests import MatchTicket

POLL_S = 0.1
IDLE_S = 0.5

log = logging.getLogger(__name__)


class Waiter:
    """Brings news of awaited chunks to the tickets of their matches."""

    def __init__(self, link: ServerLink, max_blocking_s: float) -> None:
        """Start the thread.

        Args:
            link: used by the thread alone from now on.
            max_blocking_s: how much later than it should an answer may come before the server counts as dead.
        """
        self._link, self._max_blocking_s = link, max_blocking_s
        self._lock = threading.Lock()
        self._tickets: dict[int, MatchTicket] = {}
        self._numbers = itertools.count(1)
        self._is_wanted = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="cachetier-waiter", daemon=True)
        self._thread.start()

    def add(self, ticket: MatchTicket) -> int:
        """Take a ticket whose match is about to be sent; return the number of its wait."""
        with self._lock:
            ticket.wait_number = next(self._numbers)
            self._tickets[ticket.wait_number] = ticket
        return ticket.wait_number

    def begin(self) -> None:
        """Start to ask: a ticket has a reply by which chunks are to be awaited."""
        self._is_wanted.set()

    def remove(self, ticket: MatchTicket) -> None:
        """Forget a ticket: nobody waits for more. Idempotent."""
        with self._lock:
            self._tickets.pop(ticket.wait_number, None)

    def stop(self) -> None:
        """Close the session and end the thread."""
        self._is_stopping = True
        self._is_wanted.set()
        self._thread.join(POLL_S + self._max_blocking_s + IDLE_S)

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                if self._is_wanted.wait(IDLE_S):
                    self._ask()
                elif self._link.is_up:
                    self._link.probe()  # or the first to wait after a restart of the server would find no link
            except Exception:
                log.exception("cachetier: asking for awaited chunks failed")
        self._link.close()

    def _ask(self) -> None:
        self._is_wanted.clear()
        with self._lock:
            awaiting = [ticket for ticket in self._tickets.values() if _is_awaiting(ticket)]
        if not awaiting:
            return
        reply: AwaitChunksReply | None = None
        if self._link.probe():
            reply = self._link.call(
                lambda session: AwaitChunks(session=session, within_s=POLL_S), POLL_S + self._max_blocking_s
            )
        server = self._link.server
        for ticket in awaiting:
            ticket.is_lost = reply is None or server is None or server.instance != ticket.instance
        with self._lock:
            for news in reply.news if reply is not None else ():
                if awaited := self._tickets.get(news.number):
                    awaited.news = news.match
        self._is_wanted.set()


def _is_awaiting(ticket: MatchTicket) -> bool:
    latest = ticket.news or ticket.reply
    return latest is not None and latest.num_pending > 0 and not ticket.is_lost
