"""What is answered about chunks that are not held yet: how waits get on, and promises that end. Any thread."""

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import Empty
from cachetier.core.wait_messages import AWAIT_MAX_S, AwaitChunks, AwaitChunksReply, ChunkNews, EndPromise
from cachetier.store.books import Books
from cachetier.store.matching import Matcher
from cachetier.store.promises import PROMISE_TTL_S


class Waiting:
    """Answers messages about waits and promises."""

    def __init__(self, books: Books, matcher: Matcher) -> None:
        self._books = books
        self._matcher = matcher

    def news(self, message: AwaitChunks) -> AwaitChunksReply:
        """Return what there is to tell now, without waiting for it; 404 for an unknown session."""
        if not 0 <= message.within_s <= AWAIT_MAX_S:
            raise ProtocolError(f"within_s is {message.within_s}; it must be between 0 and {AWAIT_MAX_S}")
        with self._books.lock:
            session = self._books.leases.session(message.session, self._books.clock())
            waits = self._books.waits.of_engine(session.engine)
        told = ((wait.number, self._matcher.progress(wait)) for wait in waits)
        return AwaitChunksReply(news=[ChunkNews(number=number, match=match) for number, match in told if match])

    def end_promise(self, message: EndPromise) -> Empty:
        """See `EndPromise`; 404 for an unknown session."""
        with self._books.lock:
            now = self._books.clock()
            self._books.leases.session(message.session, now)
            within_s = min(max(message.within_s, 0.0), PROMISE_TTL_S)
            self._books.promises.end(message.session, message.promise, message.num_chunks, now + within_s)
        return Empty()
