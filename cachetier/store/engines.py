"""What is answered about engines: who is there, and in which role."""

from cachetier.core.engine_messages import (
    AnnounceEngine,
    AnnounceEngineReply,
    ListEngines,
    ListEnginesReply,
    SetRole,
    SetRoleReply,
)
from cachetier.store.books import Books


class Engines:
    """Answers messages about engines. Any thread."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def announce(self, message: AnnounceEngine) -> AnnounceEngineReply:
        """See `AnnounceEngine`; 404 for an unknown session or namespace, 409 for a name that is taken."""
        with self._books.lock:
            now = self._books.clock()
            session = self._books.leases.session(message.session, now)
            self._books.namespaces.get(message.namespace)
            return AnnounceEngineReply(role=self._books.engines.announce(message, session.pid, now))

    def listing(self, _: ListEngines) -> ListEnginesReply:
        """See `ListEngines`."""
        with self._books.lock:
            infos = self._books.engines.infos(self._books.namespaces.model_of, self._books.clock())
        return ListEnginesReply(engines=infos)

    def set_role(self, message: SetRole) -> SetRoleReply:
        """See `SetRole`."""
        with self._books.lock:
            return SetRoleReply(is_known=self._books.engines.set_role(message))
